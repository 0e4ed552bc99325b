"""Making linear-time models from transformer teachers: data, the teacher, three stages, evaluation."""
