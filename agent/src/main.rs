//! The command line of flamestorm.

fn main() {}
