//! closures MILLISECONDS
//!
//! True stack: _start … main … closures::main → closures::apply → closures::main::{{closure}} →
//! closures::inlined (inlined into it) → closures::Burner::burn.

use std::hint::black_box;
use std::time::{Duration, Instant};

struct Burner {
    state: u64,
}

impl Burner {
    #[inline(never)]
    fn burn(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            for _ in 0..100_000 {
                self.state = black_box(self.state.wrapping_mul(6364136223846793005) + 1);
            }
        }
    }
}

#[inline(always)]
fn inlined(burner: &mut Burner, milliseconds: u64) {
    burner.burn(Duration::from_millis(milliseconds));
    black_box(&burner.state);
}

#[inline(never)]
fn apply(function: &mut dyn FnMut(u64), milliseconds: u64) {
    function(milliseconds);
    black_box(milliseconds);
}

fn main() {
    let milliseconds = std::env::args().nth(1).and_then(|word| word.parse().ok());
    let mut burner = Burner { state: 1 };
    apply(&mut |time| inlined(&mut burner, time), milliseconds.unwrap_or(1000));
    black_box(burner.state);
}
