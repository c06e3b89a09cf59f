//! A [`Window`] becomes a [`ResolvedProfile`], module by module.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use super::builder::Builder;
use super::elf::Named;
use super::{Options, Resolved, elf, guard, kernel, perf_map};
use crate::file::FileVersion;
use crate::profile::{
    Attribution, Backend, CALLER_MODULE, Caller, Counted, Frame, LocationId, Module, ModuleId,
    PROCESS_MODULE, Process, QUERY_MODULE, RecordingMeta, ResolvedProfile, ResolvedSample, Runtime,
    STACK_TABLE_FULL, Source, Window, key,
};

/// How far symbolising has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Modules done.
    pub done: usize,
    /// Modules in all.
    pub modules: usize,
    /// The module that comes next; empty at the end.
    pub module: &'a str,
}

/// Names every frame of the window.
///
/// There is no error: what cannot be read is named by module and address, and said in
/// [`Runtime::notes`].
pub fn resolve(
    window: Window,
    options: &Options<'_>,
    meta: RecordingMeta,
    mut progress: impl FnMut(Progress<'_>),
) -> ResolvedProfile {
    let mut builder = Builder::default();
    let mut runtime = Runtime::default();
    let locations = locate(&window, options, &mut builder, &mut runtime, &mut progress);
    let period = meta.period_ns();
    let mut samples = samples(&window, &locations, &mut builder, period);
    samples.extend(overflowed(&window, &mut builder, period));
    let (mappings, functions, locations) = builder.finish();
    ResolvedProfile {
        meta,
        runtime,
        mappings,
        functions,
        locations,
        samples,
    }
}

/// A location for every frame of the window, in the order of its frames.
fn locate(
    window: &Window,
    options: &Options<'_>,
    builder: &mut Builder,
    runtime: &mut Runtime,
    progress: &mut impl FnMut(Progress<'_>),
) -> Vec<LocationId> {
    let is_kernel = |id: ModuleId| {
        let module = window.modules().get(id.0 as usize);
        module.is_some_and(|module| matches!(module.source, Source::Kernel))
    };
    // The kernel last: readers of pprof take the first mapping for the main program.
    let mut by_module: BTreeMap<(bool, ModuleId), Vec<(usize, Frame)>> = BTreeMap::new();
    for (index, frame) in window.frames().enumerate() {
        by_module
            .entry((is_kernel(frame.module), frame.module))
            .or_default()
            .push((index, *frame));
    }
    let unknown = Module {
        name: "[no mapping]".to_owned(),
        build_id: None,
        source: Source::Unknown,
        debug_dir: None,
        version: None,
        snapshot: None,
    };
    let modules = by_module.len();
    let mut locations = vec![LocationId(u32::MAX); window.frames().len()];
    for (done, ((is_kernel, id), frames)) in by_module.into_iter().enumerate() {
        let module = window.modules().get(id.0 as usize).unwrap_or(&unknown);
        progress(Progress {
            done,
            modules,
            module: &module.name,
        });
        let names = name_frames(module, &frames, options, runtime);
        let mapping = builder.mapping(&module.name, module.build_id.as_deref(), is_kernel);
        let mut lines = BTreeMap::new();
        for (address, resolved) in names {
            lines.insert(address, builder.lines(&resolved));
        }
        for (index, frame) in frames {
            let lines = lines.get(&frame.lookup_address()).cloned();
            locations[index] = builder.location(mapping, frame.address, lines.unwrap_or_default());
        }
    }
    progress(Progress {
        done: modules,
        modules,
        module: "",
    });
    locations
}

/// Names for the lookup addresses of a module's frames: every one gets at least one.
fn name_frames(
    module: &Module,
    frames: &[(usize, Frame)],
    options: &Options<'_>,
    runtime: &mut Runtime,
) -> BTreeMap<u64, Vec<Resolved>> {
    let recorded = as_recorded(module);
    if matches!(recorded.source, Source::Unknown) && !matches!(module.source, Source::Unknown) {
        runtime.note(format!(
            "{}: its functions have no names: it was overwritten while it was recorded",
            module.name
        ));
    }
    let module = &*recorded;
    let mut addresses: Vec<u64> = frames.iter().map(|(_, f)| f.lookup_address()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    // What is read here was written by others. A reader that trips over it costs this module its
    // symbols, not the user the recording.
    let starts = catch_unwind(AssertUnwindSafe(|| starts(module, &addresses, options)));
    let starts = starts.unwrap_or_else(|_| vec![None; addresses.len()]);
    let attempt = catch_unwind(AssertUnwindSafe(|| {
        look_up(module, &addresses, &starts, options)
    }));
    let named = attempt.unwrap_or_else(|_| Named {
        notes: vec!["its symbols could not be read (hostile or broken file)".to_owned()],
        ..Named::default()
    });
    for note in named.notes {
        runtime.note(format!("{}: {note}", module.name));
    }
    let mut names = named.by_address;
    for (address, start) in addresses.iter().zip(starts) {
        names
            .entry(*address)
            .or_insert_with(|| vec![by_module(module, start.unwrap_or(*address))]);
    }
    names
}

/// One function start per address, where the module has unwind tables.
fn starts(module: &Module, addresses: &[u64], options: &Options<'_>) -> Vec<Option<u64>> {
    let mut starts = match module.source {
        Source::File(_) | Source::Vdso(_) => {
            options.function_starts.function_starts(module, addresses)
        }
        _ => Vec::new(),
    };
    starts.resize(addresses.len(), None);
    starts
}

fn look_up(
    module: &Module,
    addresses: &[u64],
    starts: &[Option<u64>],
    options: &Options<'_>,
) -> Named {
    let build_id = module.build_id.as_deref();
    match &module.source {
        Source::File(file) => match guard::check(file) {
            Ok(()) => {
                let container = module.debug_dir.as_deref().zip(build_id);
                let debug_file = container.and_then(|(dir, id)| elf::debug_file_in(dir, id));
                let debug_file = debug_file.as_ref().map(own_path);
                let ids = elf::DebugFile {
                    build_id,
                    found: debug_file,
                };
                elf::symbolize(&own_path(file), &ids, addresses, starts, options)
            }
            Err(refused) => Named {
                notes: vec![format!("symbols not read: {refused}")],
                ..Named::default()
            },
        },
        Source::Vdso(bytes) => match memory_file(bytes) {
            Ok(file) => {
                let none = elf::DebugFile::default();
                elf::symbolize(&own_path(&file), &none, addresses, starts, options)
            }
            Err(error) => Named {
                notes: vec![format!("memfd_create: {error}")],
                ..Named::default()
            },
        },
        Source::Kernel => kernel::symbolize(addresses, options),
        Source::Jit { perf_map, file, .. } => {
            perf_map::symbolize(perf_map, file.as_ref(), addresses)
        }
        Source::Unknown => Named::default(),
    }
}

/// A module whose file holds what was recorded: the copy of one that was overwritten since, which leads to no debug
/// files, or nothing where there is no copy.
fn as_recorded(module: &Module) -> Cow<'_, Module> {
    match &module.source {
        Source::File(file) if !is_as_recorded(module, file) => Cow::Owned(Module {
            source: match &module.snapshot {
                Some(snapshot) => Source::File(Arc::clone(&snapshot.file)),
                None => Source::Unknown,
            },
            build_id: None,
            debug_dir: None,
            version: None,
            ..module.clone()
        }),
        _ => Cow::Borrowed(module),
    }
}

/// Whether a file still holds the code that was recorded: it was not changed, or only its attributes were, which the
/// build id tells.
fn is_as_recorded(module: &Module, file: &File) -> bool {
    let Some(recorded) = module.version else {
        return true;
    };
    let Ok(now) = FileVersion::of(file) else {
        return false;
    };
    now == recorded
        || (now.size == recorded.size
            && now.modified == recorded.modified
            && module.build_id.is_some()
            && build_id_of(file) == module.build_id)
}

fn build_id_of(file: &File) -> Option<Vec<u8>> {
    // SAFETY: as in `session::objects`.
    let map = unsafe { memmap2::Mmap::map(file) }.ok()?;
    let object = crate::object::Object::parse(&map).ok()?;
    object.build_id.map(<[u8]>::to_vec)
}

/// A path to an open file that holds when its name has gone.
fn own_path(file: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// A file in memory, for what has no file.
fn memory_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(c"vdso", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// The name of a frame without a symbol.
fn by_module(module: &Module, start: u64) -> Resolved {
    Resolved {
        name: format!("{}+{start:#x}", module.short_name()),
        system_name: String::new(),
        file: String::new(),
        line: 0,
    }
}

fn samples(
    window: &Window,
    locations: &[LocationId],
    builder: &mut Builder,
    period: u64,
) -> Vec<ResolvedSample> {
    let mut stacks: BTreeMap<_, Arc<[LocationId]>> = BTreeMap::new();
    let mut marks = HashMap::new();
    window
        .rows()
        .map(|(row, tally)| {
            let attribution = window.attribution(row);
            let backend = attribution.and_then(|attribution| attribution.backend.as_deref());
            let stack = stacks
                .entry((
                    row.stack,
                    row.attribution.filter(|_| backend.is_some()),
                    row.process,
                ))
                .or_insert_with(|| {
                    let mut stack: Vec<_> = window.stack(row.stack).map(|f| locations[f]).collect();
                    if let Some(backend) = backend {
                        let mut mark = |module, name: &str| {
                            let key = (module, name.to_owned());
                            *marks
                                .entry(key)
                                .or_insert_with(|| builder.mark(module, name))
                        };
                        stitch(window, locations, row, backend, &mut mark, &mut stack);
                    }
                    stack.into()
                });
            let thread = Thread {
                tid: Some(row.tid),
                name: &thread_name(&row.thread_name),
            };
            let process = window.processes().get(row.process.0 as usize);
            let mut labels = labels(builder, process, thread, row.outcome.name());
            labels.extend(attributed(builder, window, process, attribution));
            ResolvedSample {
                labels: labels.into(),
                stack: stack.clone(),
                count: tally.samples,
                cpu_ns: tally.samples.saturating_mul(period),
                executions: tally.executions,
            }
        })
        .collect()
}

/// Puts above a backend's stack what asked for it: the backend's process, the query, the caller's stack.
fn stitch(
    window: &Window,
    locations: &[LocationId],
    row: &Counted,
    backend: &Backend,
    mark: &mut impl FnMut(&'static str, &str) -> LocationId,
    stack: &mut Vec<LocationId>,
) {
    let Some(query) = backend.query else {
        return;
    };
    let process = window.processes().get(row.process.0 as usize);
    stack.push(mark(
        PROCESS_MODULE,
        process.map_or("postgres", |process| process.name.as_str()),
    ));
    let text = window.queries().get(query.0 as usize);
    stack.push(mark(
        QUERY_MODULE,
        text.map_or("[query]", |query| &query.text),
    ));
    if let Caller::Known { stack: caller, .. } | Caller::Partial { stack: caller, .. } =
        backend.caller
    {
        stack.extend(window.stack(caller).map(|frame| locations[frame]));
    }
    if let Caller::Partial { outcome, .. } = backend.caller {
        let name = format!("[caller's stack incomplete: {}]", outcome.name());
        stack.push(mark(CALLER_MODULE, &name));
    }
}

/// Labels of an attribution. A backend's service is its caller's.
fn attributed(
    builder: &mut Builder,
    window: &Window,
    process: Option<&Process>,
    attribution: Option<&Attribution>,
) -> Vec<(Arc<str>, Arc<str>)> {
    let backend = attribution.and_then(|attribution| attribution.backend.as_deref());
    let trace = attribution
        .map(|attribution| attribution.trace)
        .unwrap_or_default();
    let mut service = process.map_or("", Process::service_name);
    let mut labels = Vec::new();
    if let Some(backend) = backend {
        let query = backend
            .query
            .and_then(|query| window.queries().get(query.0 as usize));
        let (caller, reason) = match &backend.caller {
            Caller::None => (None, None),
            Caller::Known { process, .. } | Caller::Partial { process, .. } => {
                (Some(process), None)
            }
            Caller::Process { process, reason } => (Some(process), Some(reason)),
            Caller::Unknown(reason) => (None, Some(reason)),
        };
        let caller = caller.and_then(|process| window.processes().get(process.0 as usize));
        service = caller.map_or("", Process::service_name);
        let name = match (caller, reason) {
            (Some(caller), _) => caller.name.as_str(),
            (None, Some(reason)) => reason.frame(),
            (None, None) => "",
        };
        let caller_outcome = match backend.caller {
            Caller::Partial { outcome, .. } => outcome.name(),
            _ => "",
        };
        let number = |number: u32| match number {
            0 => String::new(),
            number => number.to_string(),
        };
        let pid = number(caller.map_or(0, |caller| caller.pid));
        for (key, value) in [
            (key::BACKEND, &*backend.kind),
            (key::PORT, number(u32::from(backend.port)).as_str()),
            (key::QUERY_ID, query.map_or("", |query| query.id.as_str())),
            (key::QUERY, query.map_or("", |query| &*query.text)),
            (key::PHASE, backend.phase.name()),
            (key::STATE, backend.state),
            (key::WAIT, backend.wait.class()),
            (key::WAIT_EVENT, &*backend.wait.name()),
            (key::DATABASE, &*backend.database),
            (key::USER, &*backend.user),
            (key::APPLICATION, &*backend.application),
            (key::CLIENT, &*backend.client),
            (key::CALLER, backend.caller.label().unwrap_or("")),
            (key::CALLER_OUTCOME, caller_outcome),
            (key::CALLER_COMM, name),
            (key::CALLER_PID, pid.as_str()),
        ] {
            push_label(builder, &mut labels, key, value);
        }
    }
    push_label(builder, &mut labels, key::SERVICE, service);
    for (key, id) in [(key::TRACE, &trace.trace[..]), (key::SPAN, &trace.span[..])] {
        if id.iter().any(|byte| *byte != 0) {
            let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
            push_label(builder, &mut labels, key, &id);
        }
    }
    labels
}

fn push_label(
    builder: &mut Builder,
    labels: &mut Vec<(Arc<str>, Arc<str>)>,
    key: &str,
    value: &str,
) {
    if !value.is_empty() {
        labels.push((builder.string(key), builder.string(value)));
    }
}

/// The samples that found the stack table full: one frame that says so.
fn overflowed(window: &Window, builder: &mut Builder, period: u64) -> Vec<ResolvedSample> {
    if window.overflow().len() == 0 {
        return Vec::new();
    }
    let stack: Arc<[LocationId]> = Arc::new([builder.mark(STACK_TABLE_FULL, STACK_TABLE_FULL)]);
    window
        .overflow()
        .map(|(process, outcome, count)| {
            let process = window.processes().get(process.0 as usize);
            let thread = Thread {
                tid: None,
                name: STACK_TABLE_FULL,
            };
            ResolvedSample {
                labels: labels(builder, process, thread, outcome.name()).into(),
                stack: stack.clone(),
                count,
                cpu_ns: count.saturating_mul(period),
                executions: 0,
            }
        })
        .collect()
}

struct Thread<'a> {
    tid: Option<u32>,
    name: &'a str,
}

fn labels(
    builder: &mut Builder,
    process: Option<&Process>,
    thread: Thread<'_>,
    outcome: &str,
) -> Vec<(Arc<str>, Arc<str>)> {
    let pid = process.map_or_else(String::new, |process| process.pid.to_string());
    let comm = process.map_or("", |process| process.name.as_str());
    let tid = thread.tid.map_or_else(String::new, |tid| tid.to_string());
    [
        (key::PID, pid.as_str()),
        (key::COMM, comm),
        (key::TID, tid.as_str()),
        (key::THREAD, thread.name),
        (key::OUTCOME, outcome),
    ]
    .into_iter()
    .filter(|(_, value)| !value.is_empty())
    .map(|(key, value)| (builder.string(key), builder.string(value)))
    .collect()
}

/// The name up to its NUL; bytes that are no UTF-8 are replaced.
fn thread_name(bytes: &[u8; 16]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(16);
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
