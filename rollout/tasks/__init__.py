"""What is learned: prompts from a file, a reward function by name, and the task that the demo uses."""
