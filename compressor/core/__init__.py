"""The nouns that all rooms share: encodings, specs, passes, artifacts, errors. Knows no paper."""
