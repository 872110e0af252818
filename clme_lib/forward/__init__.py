"""Reading a model: tokens, passes that start at the edited layer, and what prompts' keys are."""
