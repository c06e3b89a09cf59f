//! Honest programs beside hostile ones. A recording of the whole machine must end in time, stay within its
//! memory, and report of the honest programs what it reports when they are alone.

use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{
    common::{
        HERTZ, MachineLock, Profile, Running, Stack, Summary, Workshop, agent, children_of, start,
    },
    fuse::{Fuse, Unanswered},
    processes,
};

/// Timeout for a recording of [`SECONDS`], including names.
const PATIENCE: Duration = Duration::from_secs(60);
/// Length of a recording, seconds.
const SECONDS: u32 = 3;
/// Bytes that hostile files and processes may add to the agent's memory. Pages of mapped files do not
/// count, since the kernel can reclaim them.
const MORE_MEMORY: u64 = 512 << 20;
/// Bytes of memory for the children that read files: the debug information of the largest programs needs
/// it.
const CHILDRENS_MEMORY: u64 = 6 << 30;
/// Above this the agent is stopped, before it takes the machine's memory. Bytes.
const TOO_MUCH_MEMORY: u64 = 3 << 30;
/// The least number of samples of each honest program. (The machine may be busy with other work.)
const LEAST: u64 = 10;
/// Longest permitted name of a frame, bytes.
const LONGEST_NAME: usize = 64 << 10;
/// The honest programs, and the function in which each spends its time.
const HONEST: [(&str, &str); 3] = [
    ("honest_chain", "burn"),
    ("share_three", "burn_share"),
    ("share_one", "burn_share"),
];

/// Samples of the honest programs by program name and stack, from the root down to that function.
type Chains = BTreeMap<(String, Vec<String>), u64>;

/// Starts the processes of a case with this name.
type Begin = dyn Fn(&Stage, &'static str) -> Started;

/// One hostile file or process.
pub struct Case {
    /// The name of the case, its program and its process.
    pub name: &'static str,
    /// The agent refuses something of it, and therefore a note must name it.
    refused: bool,
    /// Its own function must have its name nevertheless.
    named: bool,
    /// It may be without samples.
    unseen: bool,
    begin: Box<Begin>,
}

/// What was started for a case. Dropping it ends everything, in the order of the fields.
#[derive(Default)]
pub struct Started {
    // Dropped first: this releases processes that wait for the file system.
    pub fuse: Option<Fuse>,
    pub running: Vec<Running>,
    #[expect(dead_code, reason = "removed when it is dropped")]
    pub files: Vec<Removed>,
    /// Called as soon as the recording has begun.
    pub then: Option<Box<dyn FnOnce()>>,
    /// Names of functions that would be wrong, or that belong to another program.
    pub wrong: Vec<&'static str>,
}

impl Case {
    pub fn new(
        name: &'static str,
        begin: impl Fn(&Stage, &'static str) -> Started + 'static,
    ) -> Self {
        // The kernel truncates a process's name to 15 bytes.
        assert!(name.len() <= 15, "{name}");
        Self {
            name,
            refused: false,
            named: false,
            unseen: false,
            begin: Box::new(begin),
        }
    }

    pub fn refused(self) -> Self {
        Self {
            refused: true,
            ..self
        }
    }

    pub fn named(self) -> Self {
        Self {
            named: true,
            ..self
        }
    }

    pub fn unseen(self) -> Self {
        Self {
            unseen: true,
            ..self
        }
    }
}

impl Started {
    /// Makes its file system stop answering.
    fn hang(self) -> Self {
        if let Some(fuse) = &self.fuse {
            fuse.hang();
        }
        self
    }

    pub fn of(running: Running) -> Self {
        Self {
            running: vec![running],
            ..Self::default()
        }
    }
}

/// A file that is removed when this is dropped.
pub struct Removed(pub PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A finished recording.
pub struct Recorded {
    pub profile: Profile,
    pub summary: Summary,
    folded: String,
    stderr: String,
    memory: Memory,
    /// Time from the start of the agent to its end.
    took: Duration,
}

impl Recorded {
    /// The number of refused stack copies: new processes had used up the budget.
    fn copies_refused(&self) -> u64 {
        let refused = self.summary.0["stack_copies"]["refused"].as_object();
        let causes = refused.into_iter().flatten();
        causes.filter_map(|(_, count)| count.as_u64()).sum()
    }
}

/// Bytes of memory: the highest value so far, or the current one.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    agent: u64,
    children: u64,
}

impl Memory {
    fn of(pid: u32) -> Self {
        Self {
            agent: own_memory(pid),
            children: children_of(pid).into_iter().map(with_children).sum(),
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            agent: self.agent.max(other.agent),
            children: self.children.max(other.children),
        }
    }

    fn is_too_much(self) -> bool {
        self.agent > TOO_MUCH_MEMORY || self.children > CHILDRENS_MEMORY + MORE_MEMORY
    }
}

/// The programs of all cases, and what the agent reports of the honest ones when they are alone.
pub struct Stage {
    pub workshop: Workshop,
    /// The program of all hostile processes, with symbols and stripped.
    pub hostile: PathBuf,
    pub stripped: PathBuf,
    honest: [PathBuf; 2],
    alone: Chains,
    alone_memory: Memory,
}

impl Stage {
    /// Builds the programs, starts the honest ones, and records them alone.
    pub fn set() -> Self {
        let _lock = MachineLock::exclusive();
        let workshop = Workshop::new();
        let hostile = workshop.cc("hostile.c", "hostile", &["-g", "-pthread"]);
        let stripped = workshop.cc("hostile.c", "stripped", &["-s", "-pthread"]);
        let chain = workshop.cc("chain.c", "honest_chain", &["-g"]);
        let shares = workshop.cc("shares.c", "honest_shares", &["-g"]);
        let honest = [chain, shares];
        let running = begin_honest(&honest);
        let alone = record(&mut []).unwrap_or_else(|error| panic!("alone: {error}"));
        drop(running);
        let chains = chains(&alone.profile);
        let expected = [
            vec!["main", "first", "second", "third", "burn"],
            vec!["main", "three", "burn_share"],
            vec!["main", "one", "burn_share"],
        ];
        for ((comm, _), end) in HONEST.iter().zip(&expected) {
            let is_whole = |(key, _): (&(String, Vec<String>), &u64)| {
                key.0 == *comm
                    && key.1.first().is_some_and(|root| root == "_start")
                    && key.1.ends_with(
                        &end.iter()
                            .map(|name| (*name).to_owned())
                            .collect::<Vec<_>>(),
                    )
            };
            assert!(chains.iter().any(is_whole), "{comm} alone: {chains:#?}");
        }
        println!("alone: {:?}", alone.memory);
        Self {
            workshop,
            hostile,
            stripped,
            honest,
            alone: chains,
            alone_memory: alone.memory,
        }
    }

    /// A copy of a program, under another name.
    pub fn copy(&self, program: &Path, name: &str) -> PathBuf {
        let copy = self.workshop.path().join(name);
        let _ = fs::remove_file(&copy);
        fs::copy(program, &copy).expect("a copy");
        copy
    }

    /// Starts a hostile program, and waits until it is running its mode.
    #[track_caller]
    pub fn run(&self, program: &Path, args: &[&str]) -> Running {
        let mut command = Command::new(program);
        command.args(args);
        self.begin(command)
    }

    /// Like [`Stage::run`], with a command.
    #[track_caller]
    pub fn begin(&self, command: Command) -> Running {
        let mut running = start(command);
        running.wait_until("ready", |running| running.stdout().contains("ready"));
        running
    }

    /// Records while all these cases are running. If something is wrong and there are several, records each
    /// case alone as well, to find which one it is. Returns what is wrong.
    pub fn judge(&self, group: &str, cases: &[Case]) -> Vec<String> {
        let together: Vec<&Case> = cases.iter().collect();
        let failures = self.try_together(group, &together);
        if failures.is_empty() || cases.len() == 1 {
            return failures;
        }
        let mut all = failures;
        for case in cases {
            all.extend(self.try_together(&format!("{group}, alone: {}", case.name), &[case]));
        }
        all
    }

    /// How long a recording takes without these cases and with them: the shortest of three each, since the
    /// machine does other work too.
    pub fn times(&self, cases: &[Case]) -> Result<(Duration, Duration), String> {
        let _lock = MachineLock::exclusive();
        let _honest = begin_honest(&self.honest);
        let shortest = |started: &mut [Started]| {
            let times: Result<Vec<Duration>, String> = (0..3)
                .map(|_| record(started).map(|recorded| recorded.took))
                .collect();
            Ok::<_, String>(times?.into_iter().min().expect("three times"))
        };
        let without = shortest(&mut [])?;
        let cases: Vec<&Case> = cases.iter().collect();
        Ok((without, shortest(&mut self.start(&cases))?))
    }

    fn try_together(&self, title: &str, cases: &[&Case]) -> Vec<String> {
        let started = Instant::now();
        let attempt = catch_unwind(AssertUnwindSafe(|| self.together(cases)));
        let failures = attempt.unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            vec![format!("panic: {}", text.unwrap_or_default())]
        });
        let took = started.elapsed().as_secs_f64();
        println!("{title}: {} failures, {took:.1} s", failures.len());
        failures
            .into_iter()
            .map(|failure| format!("{title}: {failure}"))
            .inspect(|failure| println!("{failure}"))
            .collect()
    }

    fn together(&self, cases: &[&Case]) -> Vec<String> {
        let _lock = MachineLock::exclusive();
        let _honest = begin_honest(&self.honest);
        let mut started = self.start(cases);
        let recorded = match record(&mut started) {
            Ok(recorded) => recorded,
            Err(error) => return vec![error],
        };
        let mut failures = self.honest(&recorded);
        failures.extend(self.clean(&recorded));
        for (case, started) in cases.iter().zip(&started) {
            failures.extend(of_case(case, started, &recorded));
        }
        if !failures.is_empty() {
            println!("{}{}", recorded.summary, recorded.stderr);
        }
        failures
    }

    /// Kills a recording process while one of its threads waits for a file system that never answers.
    #[track_caller]
    pub fn kill_while_a_thread_waits(&self) {
        let _lock = MachineLock::exclusive();
        let running = processes::on_fuse(self, "fuse_kill", Unanswered::Everything);
        // Time for the program to load everything that it needs from its file before the file system stops.
        thread::sleep(Duration::from_millis(300));
        let hung = running.hang();
        thread::sleep(Duration::from_millis(300));
        let unanswered = || hung.fuse.as_ref().map_or(0, Fuse::unanswered);
        let before = unanswered();
        let mut command = agent(["record", "--duration", "60s"]);
        command
            .arg("--output")
            .arg(self.workshop.path().join("killed.svg"));
        let mut recording = start(command);
        recording.wait_until("a thread that waits", |_| unanswered() > before);
        let worker = recording.worker() as libc::pid_t;
        // SAFETY: it is a child of a process that has not ended and does not wait for it before.
        unsafe { libc::kill(worker, libc::SIGKILL) };
        let killed = Instant::now();
        let finished = recording.finish();
        assert!(killed.elapsed() < Duration::from_secs(30), "{finished:#?}");
        assert_eq!(finished.status.code(), Some(1), "{finished:#?}");
        assert!(finished.stderr.contains("does not answer"), "{finished:#?}");
        assert!(
            Path::new(&format!("/proc/{worker}")).exists(),
            "no thread was left over: nothing was tested"
        );
    }

    fn start(&self, cases: &[&Case]) -> Vec<Started> {
        let started: Vec<Started> = cases
            .iter()
            .map(|case| (case.begin)(self, case.name))
            .collect();
        // Time for the programs to load everything that they need from their files before the file systems
        // stop.
        thread::sleep(Duration::from_millis(300));
        started.into_iter().map(Started::hang).collect()
    }

    /// What is wrong with the honest programs' samples.
    fn honest(&self, recorded: &Recorded) -> Vec<String> {
        let mut failures = Vec::new();
        let now = chains(&recorded.profile);
        for (comm, _) in HONEST {
            let of_comm = |chains: &Chains| -> Chains {
                let own = chains.iter().filter(|(key, _)| key.0 == comm);
                own.map(|(key, count)| (key.clone(), *count)).collect()
            };
            let (alone, now) = (of_comm(&self.alone), of_comm(&now));
            let total = recorded.profile.of(comm).total();
            let sum = |is: &dyn Fn(&[String]) -> bool| -> u64 {
                let wanted = now.iter().filter(|((_, chain), _)| is(chain));
                wanted.map(|(_, count)| count).sum()
            };
            let is_same = |chain: &[String]| alone.keys().any(|(_, known)| known == chain);
            let is_part = |chain: &[String]| {
                !chain.is_empty() && alone.keys().any(|(_, known)| known.ends_with(chain))
            };
            let same = sum(&is_same);
            // Before the kernel knows a process, the rest of a stack is in a stack copy. Refused copies are
            // counted, and excuse as many incomplete stacks.
            let parts = sum(&is_part) - same;
            // But only a tenth of the samples: the programs are known soon after the recording has begun.
            let excused = parts.min(recorded.copies_refused()).min(total / 10);
            // A sample may be taken where no stack has a root: in execve, or at the first instruction of a
            // signal handler.
            let others = (total - same - excused) as f64;
            if total < LEAST || others > 1.0 + 0.01 * total as f64 {
                failures.push(format!(
                    "{comm}: {same} of {total} samples as alone, {excused} in part; {}",
                    recorded.profile.of(comm)
                ));
            }
        }
        failures
    }

    /// What is wrong with the recording itself.
    fn clean(&self, recorded: &Recorded) -> Vec<String> {
        let mut failures = Vec::new();
        let (alone, now) = (self.alone_memory, recorded.memory);
        if now.agent > alone.agent + MORE_MEMORY || now.children > CHILDRENS_MEMORY {
            failures.push(format!("{now:?}, alone {alone:?}"));
        }
        for (name, text) in [
            ("standard error", &recorded.stderr),
            ("the profile", &recorded.folded),
        ] {
            let is_raw = |char: &char| char.is_control() && !['\n', '\t'].contains(char);
            if let Some(raw) = text.chars().find(is_raw) {
                failures.push(format!("{raw:?} in {name}"));
            }
        }
        let frames = recorded.profile.0.iter().flat_map(|stack| &stack.frames);
        if let Some(longest) = frames.map(String::len).max()
            && longest > LONGEST_NAME
        {
            failures.push(format!("a name of {longest} bytes"));
        }
        failures
    }
}

/// Starts the honest programs. They also end by themselves, in case the test is killed.
fn begin_honest(programs: &[PathBuf; 2]) -> [Running; 2] {
    let running = programs.each_ref().map(|program| {
        let mut command = Command::new(program);
        command.arg("150000");
        start(command)
    });
    thread::sleep(Duration::from_millis(300));
    running
}

/// What is wrong with one case.
fn of_case(case: &Case, started: &Started, recorded: &Recorded) -> Vec<String> {
    let mut failures = Vec::new();
    let name = case.name;
    let own = recorded.profile.of(name);
    if own.total() == 0 && !case.unseen {
        failures.push(format!("{name}: no sample"));
    }
    if case.named {
        let in_code = own.filtered(|stack| !stack.in_kernel());
        // A few samples are taken before the call or after it.
        let is_named = |stack: &Stack| stack.has("work") || stack.user().last() == Some("for_ever");
        let named = in_code.count(is_named);
        // As for the honest programs: without a stack copy a sample may have no user frame.
        let bare = in_code.count(|stack| stack.user().all(str::is_empty));
        let most = in_code.total() / 4;
        let excused = bare.min(recorded.copies_refused()).min(most);
        if (named + excused) * 10 < in_code.total() * 9 {
            failures.push(format!(
                "{name}: {named} named of {}:\n{in_code}",
                in_code.total()
            ));
        }
    }
    for wrong in &started.wrong {
        if recorded.profile.count(|stack| stack.has(wrong)) > 0 {
            failures.push(format!("{name}: {wrong} is not its function"));
        }
    }
    // A note may name the case by its file or by its process.
    let pids: Vec<String> = started
        .running
        .iter()
        .map(|running| running.pid().to_string())
        .collect();
    let names = |note: &str| {
        let mut numbers = note.split(|char: char| !char.is_ascii_digit());
        note.contains(name) || numbers.any(|number| pids.iter().any(|pid| pid == number))
    };
    let notes = recorded.summary.0["notes"].as_array();
    let is_noted = notes
        .into_iter()
        .flatten()
        .any(|note| note.as_str().is_some_and(names));
    if case.refused && !is_noted {
        failures.push(format!("{name}: no note names it"));
    }
    failures
}

/// The stacks of the honest programs, from the root down to the function in which they spend their time.
fn chains(profile: &Profile) -> Chains {
    let mut chains = Chains::new();
    for stack in &profile.0 {
        let Some((_, leaf)) = HONEST.iter().find(|(comm, _)| stack.comm == *comm) else {
            continue;
        };
        let user: Vec<String> = stack.user().map(str::to_owned).collect();
        if let Some(at) = user.iter().position(|frame| frame == leaf) {
            let key = (stack.comm.clone(), user[..=at].to_vec());
            *chains.entry(key).or_default() += stack.count;
        }
    }
    chains
}

/// Records the whole machine. Returns an error if the agent does not end in time, takes too much memory, or
/// fails.
fn record(started: &mut [Started]) -> Result<Recorded, String> {
    let directory = TempDir::new().expect("temporary directory");
    let path = directory.path().join("out.folded");
    let mut command = agent(["record", "--summary", "json", "--frames", "raw"]);
    command.args(["--duration", &format!("{SECONDS}s")]);
    command.args(["--frequency", &HERTZ.to_string()]);
    command.arg("--output").arg(&path);
    let began = Instant::now();
    let mut recording = start(command);
    let mut memory = Memory::default();
    let stopped = loop {
        if recording.ended().is_some() {
            break None;
        }
        if recording.stderr().contains("recording") {
            for then in started.iter_mut().filter_map(|started| started.then.take()) {
                then();
            }
        }
        memory = memory.max(Memory::of(recording.pid()));
        if memory.is_too_much() {
            break Some(format!("{memory:?}: stopped"));
        }
        if began.elapsed() > PATIENCE {
            break Some(format!("not ended after {PATIENCE:?}: stopped"));
        }
        thread::sleep(Duration::from_millis(20));
    };
    if let Some(error) = stopped {
        recording.signal(libc::SIGKILL);
        // A process that waits for one of the file systems cannot end before that file system does.
        for started in started {
            *started = Started::default();
        }
        let _ = recording.finish();
        return Err(error);
    }
    let took = began.elapsed();
    let finished = recording.finish();
    if !finished.status.success() {
        return Err(format!("{finished:#?}"));
    }
    let folded = fs::read(&path).map_err(|error| format!("no profile: {error}"))?;
    let folded = String::from_utf8_lossy(&folded).into_owned();
    Ok(Recorded {
        profile: Profile::parse(&folded),
        summary: Summary::parse(&finished.stdout),
        folded,
        stderr: finished.stderr,
        memory,
        took,
    })
}

/// Memory of a process that is not backed by a file, now. Bytes.
fn own_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let sizes = status.lines().filter_map(|line| {
        let value = ["RssAnon:", "RssShmem:"]
            .iter()
            .find_map(|name| line.strip_prefix(name))?;
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    sizes.sum::<u64>() << 10
}

fn with_children(pid: u32) -> u64 {
    own_memory(pid) + children_of(pid).into_iter().map(with_children).sum::<u64>()
}
