//! Linux below us: programs, maps, links, pins, routes.
