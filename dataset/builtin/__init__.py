"""The built-in world: text, chat, exercises and their checkers, generated from a seed in seconds."""
