"""One study: the full schedule, the search, verification, verdict."""
