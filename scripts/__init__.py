"""Using it: chat, set-up and the commands that tie the stages together."""
