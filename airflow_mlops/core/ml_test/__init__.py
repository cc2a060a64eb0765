"""The ML Test Score: its 28 tests and how the ledger answers them."""
