"""The engine alone: loading, prompts and decoding, with llama.cpp beside it when asked for."""
