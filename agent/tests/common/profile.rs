//! Reads what the agent wrote, without any of the agent's own code.

use std::{fmt, fs, path::Path};

use serde_json::Value;

/// One line of a folded profile.
#[derive(Clone, Debug)]
pub struct Stack {
    pub comm: String,
    /// From the root to the leaf.
    pub frames: Vec<String>,
    pub count: u64,
}

/// A folded profile.
#[derive(Clone, Debug)]
pub struct Profile(pub Vec<Stack>);

/// The object that `--summary json` prints.
#[derive(Clone, Debug)]
pub struct Summary(pub Value);

impl Stack {
    fn parse(line: &str) -> Option<Self> {
        let (stack, count) = line.rsplit_once(' ')?;
        let mut frames = stack.split(';').map(str::to_owned);
        Some(Self {
            comm: frames.next()?,
            frames: frames.collect(),
            count: count.parse().ok()?,
        })
    }

    /// The frames in user space, from the root to the leaf.
    pub fn user(&self) -> impl Iterator<Item = &str> {
        self.frames
            .iter()
            .map(String::as_str)
            .filter(|frame| !frame.ends_with("_[k]"))
    }

    /// Whether the sample was taken in the kernel.
    pub fn in_kernel(&self) -> bool {
        self.frames
            .last()
            .is_some_and(|leaf| leaf.ends_with("_[k]"))
    }

    /// Whether the stack contains these functions as direct callers of each other, in this order.
    pub fn has_chain(&self, chain: &[&str]) -> bool {
        let user: Vec<&str> = self.user().collect();
        user.windows(chain.len()).any(|window| window == chain)
    }

    /// Whether the stack contains these functions in this order. Other frames may be between them.
    pub fn has_in_order(&self, names: &[&str]) -> bool {
        let mut user = self.user();
        names.iter().all(|name| user.any(|frame| frame == *name))
    }

    /// Whether the stack contains the function.
    pub fn has(&self, name: &str) -> bool {
        self.user().any(|frame| frame == name)
    }

    /// Whether the root is the first function of a process: `_start` of the program, or of the dynamic
    /// linker while it loads the program.
    pub fn starts_at_process_start(&self) -> bool {
        self.user()
            .next()
            .is_some_and(|root| root == "_start" || is_in_module(root, "ld-linux-x86-64.so.2"))
    }
}

/// Whether a frame has no symbol, and is named after this module and the start of its function.
pub fn is_in_module(frame: &str, module: &str) -> bool {
    frame
        .strip_prefix(module)
        .and_then(|rest| rest.strip_prefix("+0x"))
        .is_some_and(|address| u64::from_str_radix(address, 16).is_ok())
}

impl Profile {
    /// Reads the lines of a folded profile.
    #[track_caller]
    pub fn parse(text: &str) -> Self {
        let stack = |line: &str| {
            Stack::parse(line).unwrap_or_else(|| panic!("not a folded stack: {line:?}"))
        };
        Self(text.lines().map(stack).collect())
    }

    /// Reads a folded file.
    #[track_caller]
    pub fn read(path: &Path) -> Self {
        let text =
            fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self::parse(&text)
    }

    /// The samples of processes with this name.
    pub fn of(&self, comm: &str) -> Self {
        self.filtered(|stack| stack.comm == comm)
    }

    /// The samples for which `keep` holds.
    pub fn filtered(&self, keep: impl Fn(&Stack) -> bool) -> Self {
        Self(self.0.iter().filter(|stack| keep(stack)).cloned().collect())
    }

    /// The number of samples.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|stack| stack.count).sum()
    }

    /// The number of samples for which `holds` is true.
    pub fn count(&self, holds: impl Fn(&Stack) -> bool) -> u64 {
        self.0
            .iter()
            .filter(|stack| holds(stack))
            .map(|stack| stack.count)
            .sum()
    }

    /// Asserts that `holds` is true for at least the share `least` of the samples. On failure shows the
    /// samples for which it is not.
    #[track_caller]
    pub fn assert_share(&self, least: f64, what: &str, holds: impl Fn(&Stack) -> bool) {
        let (total, count) = (self.total(), self.count(&holds));
        let others = self.filtered(|stack| !holds(stack));
        assert!(
            total > 0 && count as f64 >= least * total as f64,
            "{what}: {count} of {total}, expected {:.1} %; the others:\n{others}",
            100.0 * least
        );
    }

    /// Asserts that every frame has a name: not an empty one, not a placeholder, and not a bare address.
    #[track_caller]
    pub fn assert_named(&self) {
        let unnamed = |frame: &String| {
            let name = frame.trim_end_matches("_[k]");
            name.is_empty()
                || name.starts_with("0x")
                || name.contains("[unknown]")
                || name.contains("??")
        };
        let bad = self.filtered(|stack| stack.frames.iter().any(unnamed));
        assert!(bad.0.is_empty(), "frames without a name in:\n{bad}");
    }
}

/// The stacks with the most samples, in full.
impl fmt::Display for Profile {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut stacks: Vec<&Stack> = self.0.iter().collect();
        stacks.sort_by_key(|stack| std::cmp::Reverse(stack.count));
        for stack in stacks.iter().take(12) {
            writeln!(
                out,
                "{} {};{}",
                stack.count,
                stack.comm,
                stack.frames.join(";")
            )?;
        }
        if stacks.len() > 12 {
            writeln!(out, "… and {} more stacks", stacks.len() - 12)?;
        }
        Ok(())
    }
}

/// The parts of the summary that explain a failed test.
impl fmt::Display for Summary {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for key in ["samples", "frames_unnamed", "lost", "notes", "agent"] {
            writeln!(out, "{key}: {}", self.0[key])?;
        }
        let Some(outcomes) = self.0["outcomes"].as_object() else {
            return writeln!(out, "outcomes: {}", self.0["outcomes"]);
        };
        for (name, count) in outcomes {
            if count.as_f64() != Some(0.0) {
                writeln!(out, "{name}: {count}")?;
            }
        }
        Ok(())
    }
}

impl Summary {
    /// Parses standard output, which must contain nothing else.
    #[track_caller]
    pub fn parse(stdout: &str) -> Self {
        Self(
            serde_json::from_str(stdout)
                .unwrap_or_else(|error| panic!("--summary json: {error}\n{stdout}")),
        )
    }

    /// The number at a JSON pointer.
    #[track_caller]
    pub fn number(&self, pointer: &str) -> f64 {
        self.0
            .pointer(pointer)
            .and_then(Value::as_f64)
            .unwrap_or_else(|| panic!("no number {pointer} in {:#}", self.0))
    }

    /// The number of samples with this outcome.
    #[track_caller]
    pub fn outcome(&self, name: &str) -> f64 {
        assert!(
            self.0["outcomes"].is_object(),
            "no outcomes in {:#}",
            self.0
        );
        self.0["outcomes"][name].as_f64().unwrap_or(0.0)
    }

    /// The number of samples that the agent lost, for any cause.
    #[track_caller]
    pub fn lost(&self) -> f64 {
        match &self.0["lost"] {
            Value::Object(causes) => causes.values().filter_map(Value::as_f64).sum(),
            other => panic!("`lost` is not a list of causes: {other}"),
        }
    }

    /// The share of the samples whose stack is complete.
    #[track_caller]
    pub fn complete_share(&self) -> f64 {
        let complete: f64 = ["complete", "complete_by_frame_pointer", "kernel_only"]
            .map(|name| self.outcome(name))
            .iter()
            .sum();
        complete / self.number("/samples")
    }
}
