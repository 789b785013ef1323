"""What a recipe may write under each pass: a file per pass, free of torch."""
