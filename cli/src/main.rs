//! The `tollway` command.
fn main() {}
