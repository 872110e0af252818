"""Running a model: tokens, passes that start at the edited layer, and the keys of prompts."""
