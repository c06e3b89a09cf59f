//! The unwind tables, from a file's `.eh_frame` to the rule for an address: no root, no kernel.
//!
//! - `real_files`: the tables of installed programs and libraries, against gimli's rows.
//! - `programs`: call frame information made up at random, against gimli's rows.
//! - `framehop`: callers that the step finds, against the unwinder framehop.
//! - `gaps`: rules derived from instructions, where no unwind entry covers the code.
//! - `hostile`: damaged files. `FLAMESTORM_FUZZ_SECONDS` makes it last longer (`make fuzz`).

mod framehop;
mod gaps;
mod hostile;
mod inputs;
mod programs;
mod real_files;
mod reference;
