//! CPUs that come online and go offline during a recording.

use std::time::{Duration, Instant};

use super::control::Control;
use crate::kernel::{Kernel, cpus_online};

/// Interval at which the list of online CPUs is read.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The CPUs of a recording.
pub struct Cpus {
    began: Instant,
    looked: Instant,
    /// Correction of the CPU time, seconds: the time of CPUs that went offline, minus the time before other
    /// CPUs came online. It is added to the time of the CPUs that are online at the end.
    beyond: f64,
    /// Online CPUs that cannot be sampled, with the reason.
    unsampled: Vec<(u32, String)>,
}

impl Cpus {
    /// Notes the present time as the beginning of the recording.
    pub fn new() -> Cpus {
        let began = Instant::now();
        Cpus {
            began,
            looked: began,
            beyond: 0.0,
            unsampled: Vec::new(),
        }
    }

    /// Starts to sample the CPUs that have come online, and stops following those that have gone offline.
    /// Does so at most once a second.
    pub fn settle(&mut self, kernel: &mut Kernel, control: &mut Control) {
        if self.looked.elapsed() < LOOK_EVERY {
            return;
        }
        self.looked = Instant::now();
        let Ok(online) = cpus_online() else {
            return;
        };
        let followed = kernel.cpus().to_vec();
        for &cpu in followed.iter().filter(|cpu| !online.contains(cpu)) {
            log::info!("CPU {cpu} is offline");
            control.leave_cpu(cpu);
            if let Err(error) = kernel.remove_cpu(cpu) {
                log::warn!("CPU {cpu}: {error}");
            }
            self.beyond += self.began.elapsed().as_secs_f64();
        }
        self.unsampled.retain(|(cpu, _)| online.contains(cpu));
        for &cpu in online.iter().filter(|cpu| !followed.contains(cpu)) {
            if self.unsampled.iter().any(|(known, _)| *known == cpu) {
                continue;
            }
            let added = control
                .lifecycle
                .follow(cpu)
                .and_then(|()| kernel.add_cpu(cpu));
            match added {
                Ok(()) => {
                    log::info!("CPU {cpu} is online");
                    self.beyond -= self.began.elapsed().as_secs_f64();
                }
                Err(error) => self.unsampled.push((cpu, error.to_string())),
            }
        }
    }

    /// The time of all CPUs in a recording of this length, seconds. `now` is the number of CPUs at its end.
    pub fn seconds(&self, duration: Duration, now: usize) -> f64 {
        duration.as_secs_f64() * now as f64 + self.beyond
    }

    /// Notes for the reader of the profile: the CPUs that are not sampled.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        self.unsampled.iter().map(|(cpu, reason)| {
            format!("CPU {cpu} came online during the recording and is not sampled: {reason}")
        })
    }
}
