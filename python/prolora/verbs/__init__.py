"""What verbs share: options, their keywords, output paths, results, batches."""
