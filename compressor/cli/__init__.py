"""The command: parsing, printing, exit statuses."""
