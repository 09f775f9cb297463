"""Files: what untrusted ones may be, the fields of their JSON, and writing them completely or not at all."""
