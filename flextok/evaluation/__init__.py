"""Numbers that say what a tokenizer keeps of images, and what its tokens and features hold."""
