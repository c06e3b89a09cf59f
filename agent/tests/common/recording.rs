//! `flamestorm record … -- PROGRAM`, and what must hold for every recording.

use std::{ffi::OsString, path::Path};

use tempfile::TempDir;

use super::{Finished, HERTZ, MANY_HERTZ, MachineLock, Profile, Summary, agent, start};

/// The agent's record of one command.
pub struct Recording {
    pub profile: Profile,
    pub summary: Summary,
    /// Of the agent; the command's standard error is in it too.
    pub stderr: String,
    pub finished: Finished,
    hertz: u32,
}

impl Recording {
    /// Records `program` until it ends, beside other recordings.
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

    /// The same with many samples.
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

    /// A value that the program printed as `name value`: on the agent's standard error, since the summary has its
    /// standard output.
    #[track_caller]
    pub fn printed(&self, name: &str) -> f64 {
        self.stderr
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
            .unwrap_or_else(|| panic!("the program printed no {name}: {:#?}", self.finished))
    }

    /// Samples that so much CPU time is worth.
    pub fn expected(&self, cpu_ms: f64) -> f64 {
        cpu_ms / 1000.0 * f64::from(self.hertz)
    }

    /// What holds for every recording of a program that burns `cpu_ms` of CPU time: its exit status
    /// was 0, nothing was lost, every frame has a name, all but a hundredth of the stacks are whole,
    /// and samples of at least half the time are there (a virtual machine's stolen time is in
    /// nobody's samples).
    #[track_caller]
    pub fn assert_sound(&self, cpu_ms: f64) -> &Self {
        assert_eq!(self.finished.code(), 0, "{:#?}", self.finished);
        self.profile.assert_named();
        let summary = &self.summary;
        let total = self.profile.total() as f64;
        assert_eq!(summary.number("/samples"), total, "{summary}");
        assert_eq!(summary.lost(), 0.0, "{summary}");
        // The agent's own programs in the kernel have gone when functions are named, and their symbols with them. Only a
        // frame that the kernel called as a program may be without a name.
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
