//! Identity: where certificates come from, when they are renewed and how peers are checked.
