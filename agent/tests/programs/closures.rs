//! closures MILLISECONDS
//!
//! True stack: _start … main … closures::main → closures::apply → closures::main::{{closure}} →
//! closures::inlined (inlined into it) → closures::Burner::burn.

use std::hint::black_box;

unsafe extern "C" {
    /// CPU time of the process in microseconds (libc's `clock`; POSIX sets CLOCKS_PER_SEC so).
    safe fn clock() -> i64;
}

struct Burner {
    state: u64,
}

impl Burner {
    #[inline(never)]
    fn burn(&mut self, milliseconds: i64) {
        let end = clock() + milliseconds * 1000;
        while clock() < end {
            for _ in 0..100_000 {
                self.state = black_box(self.state.wrapping_mul(6364136223846793005) + 1);
            }
        }
    }
}

#[inline(always)]
fn inlined(burner: &mut Burner, milliseconds: i64) {
    burner.burn(milliseconds);
    black_box(&burner.state);
}

#[inline(never)]
fn apply(function: &mut dyn FnMut(i64), milliseconds: i64) {
    function(milliseconds);
    black_box(milliseconds);
}

fn main() {
    let milliseconds = std::env::args().nth(1).and_then(|word| word.parse().ok());
    let mut burner = Burner { state: 1 };
    apply(&mut |time| inlined(&mut burner, time), milliseconds.unwrap_or(1000));
    black_box(burner.state);
}
