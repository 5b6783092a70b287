"""Pictures from prompts, and how they are kept."""
