"""What every verb needs: options, their keywords, output paths, results, batches."""
