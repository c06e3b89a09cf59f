//! Recordings of one command (`flamestorm record … -- PROGRAM`), and what must hold for each of them.

use std::{ffi::OsString, path::Path};

use tempfile::TempDir;

use super::{Finished, HERTZ, MANY_HERTZ, MachineLock, Profile, Summary, agent, start};

/// The agent's recording of one command.
pub struct Recording {
    pub profile: Profile,
    pub summary: Summary,
    /// Standard error of the agent, which the recorded command shares.
    pub stderr: String,
    pub finished: Finished,
    hertz: u32,
}

impl Recording {
    /// Records `program` until it ends. Other recordings may run at the same time.
    #[track_caller]
    pub fn of(program: &Path, args: &[&str]) -> Self {
        let _lock = MachineLock::shared();
        Self::run(HERTZ, program, args)
    }

    /// Records `program` until it ends, while no other recording is made.
    #[track_caller]
    pub fn undisturbed(program: &Path, args: &[&str]) -> Self {
        let _lock = MachineLock::exclusive();
        Self::run(HERTZ, program, args)
    }

    /// Records `program` until it ends, at [`MANY_HERTZ`] and while no other recording is made.
    #[track_caller]
    pub fn alone(program: &Path, args: &[&str]) -> Self {
        let _lock = MachineLock::exclusive();
        Self::run(MANY_HERTZ, program, args)
    }

    #[track_caller]
    fn run(hertz: u32, program: &Path, args: &[&str]) -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let folded = directory.path().join("out.folded");
        let mut words: Vec<OsString> = [
            "record",
            "--summary",
            "json",
            "--frames",
            "raw",
            "--frequency",
        ]
        .map(OsString::from)
        .to_vec();
        words.push(hertz.to_string().into());
        words.extend(["--output".into(), folded.clone().into(), "--".into()]);
        words.push(program.into());
        words.extend(args.iter().map(OsString::from));
        let finished = start(agent(words)).finish();
        assert!(folded.exists(), "no profile was written: {finished:#?}");
        Self {
            profile: Profile::read(&folded),
            summary: Summary::parse(&finished.stdout),
            stderr: finished.stderr.clone(),
            finished,
            hertz,
        }
    }

    /// A value that the program printed as `name value`. With `--summary json` the agent redirects the
    /// command's standard output to standard error.
    #[track_caller]
    pub fn printed(&self, name: &str) -> f64 {
        self.stderr
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
            .unwrap_or_else(|| panic!("the program printed no {name}: {:#?}", self.finished))
    }

    /// The number of samples that this much CPU time gives.
    pub fn expected(&self, cpu_ms: f64) -> f64 {
        cpu_ms / 1000.0 * f64::from(self.hertz)
    }

    /// Asserts what must hold for every recording of a program that burns `cpu_ms` of CPU time: its exit
    /// status is 0, no sample is lost, every frame has a name, at least 99 % of the stacks are complete,
    /// and the number of samples is at least half of what the CPU time gives. (Time that the host of a
    /// virtual machine steals is in no sample.)
    #[track_caller]
    pub fn assert_sound(&self, cpu_ms: f64) -> &Self {
        assert_eq!(self.finished.code(), 0, "{:#?}", self.finished);
        self.profile.assert_named();
        let summary = &self.summary;
        let total = self.profile.total() as f64;
        assert_eq!(summary.number("/samples"), total, "{summary}");
        assert_eq!(summary.lost(), 0.0, "{summary}");
        // When functions are named the agent's own BPF programs have been unloaded, and their symbols are
        // gone. Only a frame that the kernel called as a BPF program may be without a name.
        let in_programs = self.profile.count(|stack| {
            stack.frames.windows(2).any(|pair| {
                pair[0].starts_with("bpf_trace_run") && pair[1].starts_with("[kernel]+0x")
            })
        });
        let unnamed = summary.number("/frames_unnamed");
        assert!(unnamed <= in_programs as f64, "{summary}\n{}", self.profile);
        assert!(
            summary.complete_share() >= 0.99,
            "complete: {}\n{summary}\n{}",
            summary.complete_share(),
            self.profile
        );
        let expected = self.expected(cpu_ms);
        assert!(
            total >= expected / 2.0 && total <= expected * 1.5 + 50.0,
            "{total} samples of about {expected}"
        );
        self
    }
}
