"""What a language model is: configuration, decoder, tokenizer, generation, checkpoints."""
