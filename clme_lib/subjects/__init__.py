"""The models under edit: loading them, their settings, and the embedded models."""
