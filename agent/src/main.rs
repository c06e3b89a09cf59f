//! The command line of flamestorm.
use flamestorm::kernel::*;
fn main() {
    let period = 1_000_000_000 / 99;
    let t = std::time::Instant::now();
    let mut k = match Kernel::load(&Options {
        period_ns: period,
        filter: false,
    }) {
        Ok(k) => k,
        Err(e) => {
            eprintln!("{e:?}");
            return;
        }
    };
    eprintln!(
        "loaded {:?}, verified {:?}",
        t.elapsed(),
        k.verified_instructions()
    );
    let mut l = LifecycleEvents::open(&k.cpus().to_vec()).unwrap();
    k.start(period).unwrap();
    let mut n = 0;
    let mut copies = 0;
    let mut bytes = 0;
    for _ in 0..30 {
        std::thread::sleep(std::time::Duration::from_millis(100));
        k.read(|r| match r {
            Record::Sample(s) => {
                n += 1;
                if n < 10 {
                    println!(
                        "{:?} k{} {:?}",
                        s.header,
                        s.kernel_frames().count(),
                        s.outcome
                    );
                }
            }
            Record::StackCopy(c) => {
                copies += 1;
                bytes += c.bytes.len()
            }
        });
        let mut ev = vec![];
        l.read(&mut ev);
        for e in ev.iter().take(2) {
            println!("{e:?}");
        }
    }
    use agent_ebpf::counters::Counter::*;
    for c in [Ticks, Idle, Sampled, MissedTicks, StackCopies, RingFull] {
        println!("{c:?} {}", k.counter(c));
    }
    println!(
        "{n} {copies} {bytes} maps {} runtime {:?} stack+sample ns {}",
        k.map_bytes(),
        k.sampler_run_time(),
        k.counter(SampleNanos)
    );
}
