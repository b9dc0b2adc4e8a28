"""What reads files and text from outside: headers, JSON, names and paths, redaction, the template sandbox."""
