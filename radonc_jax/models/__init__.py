"""The decoder, its adapters, and the way in and out of Hugging Face folders."""
