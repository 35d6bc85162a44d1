"""What a job writes, and how it is read: files whole or not at all, checked by their form and their checksums."""
