//! The layer-major engine and the commands.
