"""Training data: generated pictures, photos and text, mixed into batches. See README.md."""
