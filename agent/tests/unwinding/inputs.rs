//! Inputs that the tests of the unwind tables share: real files, pseudo-random numbers, and a stack on
//! which every read succeeds.

use agent_ebpf::unwind::{Cursor, Registers, reg};
use std::path::{Path, PathBuf};

/// Files that every Debian has. This test program itself (a Rust program) is added to them.
const PRESENT: [&str; 2] = [
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib64/ld-linux-x86-64.so.2",
];

/// Files of packages that `make test` does not install. Missing ones are skipped.
const PERHAPS: [&str; 10] = [
    "/usr/lib/postgresql/15/bin/postgres",
    "/lib/x86_64-linux-gnu/libcrypto.so.3",
    "/lib/x86_64-linux-gnu/libssl.so.3",
    "/lib/x86_64-linux-gnu/libz.so.1",
    "/lib/x86_64-linux-gnu/libm.so.6",
    "/lib/x86_64-linux-gnu/libstdc++.so.6",
    "/lib/x86_64-linux-gnu/libgcc_s.so.1",
    "/usr/bin/python3.11",
    "/usr/bin/node",
    "/usr/lib/chromium/chromium",
];

/// Size of the largest file that a test in the debug profile reads whole, bytes.
pub const LARGE: u64 = 64 << 20;

/// All files to test with that have at most `limit` bytes, with their content.
pub fn files(limit: u64) -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = PRESENT.iter().map(PathBuf::from).collect();
    paths.push(std::env::current_exe().expect("the path of this test"));
    for path in PERHAPS {
        match Path::new(path).metadata() {
            Err(_) => println!("{path} is not installed here: not tested"),
            Ok(data) if data.len() > limit => println!("{path} is too large for this test"),
            Ok(_) => paths.push(PathBuf::from(path)),
        }
    }
    let read = |path: PathBuf| {
        let data = std::fs::read(&path).expect("a readable file");
        (path, data)
    };
    paths.into_iter().map(read).collect()
}

/// The generator SplitMix64 (Steele, Lea, Flood 2014), which gives the same numbers in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number less than `bound`, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The word at an address of the stack: a different one everywhere, the same in every run, and never 0.
/// Taken as an address it lies above the stack.
pub fn word(address: u64) -> u64 {
    0x7000_0000_0000 + (mix(address) & 0xff_ffff_fff8)
}

/// A machine state at `ip` in which every register points somewhere into the stack.
pub fn cursor(ip: u64, random: &mut Random) -> Cursor {
    let sp = 0x6000_0000_0000 + random.below(1 << 20) * 16;
    let mut regs = Registers {
        ip,
        ..Registers::default()
    };
    for register in &mut regs.gp {
        *register = sp + 0x1000 + random.below(1 << 10) * 8;
    }
    regs.gp[reg::RSP as usize] = sp;
    Cursor::new(regs)
}

/// Reads from the stack of [`word`]s. Never fails.
pub fn read(address: u64, words: &mut [u64]) -> bool {
    for (index, out) in words.iter_mut().enumerate() {
        *out = word(address.wrapping_add(index as u64 * 8));
    }
    true
}
