//! The monotonic clock of samples and events, and the offset of the wall clock from it.

use agent_ebpf::postgres::{WALL_CLOCK_STEP, WallClock};

/// Nanoseconds of `CLOCK_MONOTONIC`, the clock of every sample and event.
pub fn now() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

fn clock(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the struct is valid and is only written to; these clocks always exist.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Reads the wall clock's offset and detects when the wall clock was set.
#[derive(Default)]
pub struct WallClockReader {
    clock: WallClock,
    read_at: u64,
}

impl WallClockReader {
    /// The current offsets of the wall clock and of TAI, and the wall clock's offset before it was last set.
    pub fn read(&mut self) -> WallClock {
        // The TAI offset is read first. If the clock is set between the two reads, the kernel programs then
        // compare against the old TAI offset and notice the change. In the other order they would not notice it.
        self.clock.tai_offset = offset_of(libc::CLOCK_TAI);
        let (offset, time) = (offset_of(libc::CLOCK_REALTIME), now());
        self.update(offset, time);
        self.clock
    }

    fn update(&mut self, offset: i64, time: u64) {
        let before = self.clock.offset;
        if self.read_at == 0 {
            self.clock.offset_before = offset;
        } else if offset.abs_diff(before) > WALL_CLOCK_STEP {
            self.clock.offset_before = before;
            self.clock.set_after = self.read_at;
        }
        self.clock.offset = offset;
        self.read_at = time;
    }
}

/// Offset of a clock from `CLOCK_MONOTONIC`, nanoseconds. Of three readings the one that took
/// the least time is used.
fn offset_of(id: libc::clockid_t) -> i64 {
    let read = || {
        let before = now() as i64;
        let time = clock(id) as i64;
        let after = now() as i64;
        (after - before, time - (before + (after - before) / 2))
    };
    let readings = [read(), read(), read()];
    readings.into_iter().min().map_or(0, |(_, offset)| offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The offset before a step is kept until the next step. Small differences are not steps.
    #[test]
    fn a_clock_that_is_set() {
        let mut reader = WallClockReader::default();
        let mut read = |offset, time| {
            reader.update(offset, time);
            let clock = reader.clock;
            (clock.offset, clock.offset_before, clock.set_after)
        };
        assert_eq!(read(5_000_000, 10), (5_000_000, 5_000_000, 0));
        assert_eq!(read(5_000_300, 20), (5_000_300, 5_000_000, 0));
        assert_eq!(read(-7_000_000, 30), (-7_000_000, 5_000_300, 20));
        assert_eq!(read(-7_000_100, 40), (-7_000_100, 5_000_300, 20));
        assert_eq!(read(9_000_000, 50), (9_000_000, -7_000_100, 40));
    }
}
