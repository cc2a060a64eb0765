"""What the validation and the screen are made of: quarantine, rows by name, the page."""
