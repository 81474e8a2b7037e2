"""What people read: the report page, exported files, and what to do next."""
