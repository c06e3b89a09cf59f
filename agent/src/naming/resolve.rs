//! Converts a [`Window`] into a [`ResolvedProfile`], module by module.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::Arc;

use super::Namer;
use super::builder::Builder;
use crate::file::FileVersion;
use crate::profile::{
    ADDRESS_ONLY, Attribution, Backend, CALLER_MODULE, Caller, Frame, LocationId, Module, ModuleId,
    PROCESS_MODULE, Process, QUERY_MODULE, RARE_STACKS, RecordingMeta, ResolvedProfile,
    ResolvedSample, RowKey, Runtime, STACK_TABLE_FULL, Source, Window, key,
};
use crate::symbolize::{Named, NamedFunction, Options, name_module};

/// Progress of symbolization.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Modules that are done.
    pub done: usize,
    /// Modules in all.
    pub modules: usize,
    /// The module that is next; empty at the end.
    pub module: &'a str,
}

/// Names every frame of the window, in this process. Only for files that are known to be harmless.
///
/// This cannot fail. Frames of files that cannot be read are named by module and address, and a note in
/// [`Runtime::notes`] says so.
pub fn resolve(
    window: Window,
    options: &Options<'_>,
    meta: RecordingMeta,
    mut progress: impl FnMut(Progress<'_>),
) -> ResolvedProfile {
    let mut name =
        |module: &Module, addresses: &[u64]| name_module(module, addresses, options, &mut |_| {});
    resolve_by(&window, &mut name, meta, &mut progress)
}

/// Names every frame of the window as [`resolve`] does, in a child process with limits.
pub fn resolve_apart(
    window: &Window,
    namer: &mut Namer<'_>,
    meta: RecordingMeta,
    mut progress: impl FnMut(Progress<'_>),
) -> ResolvedProfile {
    let mut name = |module: &Module, addresses: &[u64]| namer.name(module, addresses);
    let mut profile = resolve_by(window, &mut name, meta, &mut progress);
    for note in namer.notes() {
        profile.runtime.note(note);
    }
    profile
}

/// Names every frame by module and address only, which is fast and reads no files.
pub fn resolve_unnamed(window: &Window, meta: RecordingMeta) -> ResolvedProfile {
    resolve_by(window, &mut |_, _| Named::default(), meta, &mut |_| {})
}

/// Looks up the names of a module's addresses.
type NameModule<'a> = dyn FnMut(&Module, &[u64]) -> Named + 'a;

fn resolve_by(
    window: &Window,
    name: &mut NameModule<'_>,
    meta: RecordingMeta,
    progress: &mut dyn FnMut(Progress<'_>),
) -> ResolvedProfile {
    let mut builder = Builder::default();
    let mut runtime = Runtime::default();
    let locations = locate(window, name, &mut builder, &mut runtime, progress);
    let period = meta.period_ns();
    let mut samples = samples(window, &locations, &mut builder, period);
    samples.extend(overflowed(window, &mut builder, period));
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
    name: &mut NameModule<'_>,
    builder: &mut Builder,
    runtime: &mut Runtime,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Vec<LocationId> {
    let is_kernel = |id: ModuleId| {
        let module = window.modules().get(id.0 as usize);
        module.is_some_and(|module| matches!(module.source, Source::Kernel))
    };
    // The kernel is last, because pprof takes the first mapping for the main program.
    let mut by_module: BTreeMap<(bool, ModuleId), Vec<(usize, Frame)>> = BTreeMap::new();
    for (index, frame) in window.frames().enumerate() {
        by_module
            .entry((is_kernel(frame.module), frame.module))
            .or_default()
            .push((index, *frame));
    }
    let unknown = Module::unknown();
    let module = |id: ModuleId| window.modules().get(id.0 as usize).unwrap_or(&unknown);
    let modules = by_module.len();
    let mut order: Vec<_> = by_module
        .into_iter()
        .map(|((is_kernel, id), frames)| {
            let module = module(id);
            let mapping = builder.mapping(&module.name, module.build_id.as_deref(), is_kernel);
            (module, mapping, frames)
        })
        .collect();
    // Files that may not answer are read last, so that they cannot keep others from being read.
    order.sort_by_key(|(module, ..)| !module.is_local);
    let mut locations = vec![LocationId(u32::MAX); window.frames().len()];
    for (done, (module, mapping, frames)) in order.into_iter().enumerate() {
        progress(Progress {
            done,
            modules,
            module: &module.name,
        });
        let names = name_frames(module, &frames, name, runtime);
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

/// Names for the lookup addresses of a module's frames, at least one for each address.
fn name_frames(
    module: &Module,
    frames: &[(usize, Frame)],
    name: &mut NameModule<'_>,
    runtime: &mut Runtime,
) -> BTreeMap<u64, Vec<NamedFunction>> {
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
    let named = name(module, &addresses);
    for note in named.notes {
        runtime.note(format!("{}: {note}", module.name));
    }
    let mut names = named.by_address;
    for (index, address) in addresses.iter().enumerate() {
        let start = named.starts.get(index).copied().flatten();
        let functions = names.entry(*address).or_default();
        if functions.is_empty() {
            functions.push(by_module(module, *address, start));
        }
    }
    names
}

/// The module with a file that has the recorded contents. If the file has been overwritten since, this is
/// its copy, without debug files, or no file if there is no copy.
fn as_recorded(module: &Module) -> Cow<'_, Module> {
    match &module.source {
        Source::File(file) if !is_as_recorded(module, file) => Cow::Owned(Module {
            source: match &module.snapshot {
                Some(snapshot) => Source::File(Arc::clone(&snapshot.file)),
                None => Source::Unknown,
            },
            build_id: None,
            is_local: true,
            debug_dir: None,
            version: None,
            ..module.clone()
        }),
        _ => Cow::Borrowed(module),
    }
}

/// Whether a file still has the code that was recorded. Renaming or removing a file changes its ctime, but
/// not its mtime, so only size and mtime are compared.
fn is_as_recorded(module: &Module, file: &File) -> bool {
    let Some(recorded) = module.version else {
        return true;
    };
    FileVersion::of(file)
        .is_ok_and(|now| (now.size, now.modified) == (recorded.size, recorded.modified))
}

/// The name of a frame without a symbol: module and start of the function, or module and address if the
/// start is not known.
fn by_module(module: &Module, address: u64, start: Option<u64>) -> NamedFunction {
    let system_name = match start {
        Some(_) => String::new(),
        None => ADDRESS_ONLY.to_owned(),
    };
    NamedFunction {
        name: format!("{}+{:#x}", module.short_name(), start.unwrap_or(address)),
        system_name,
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
                    row.is_cut,
                    row.attribution.filter(|_| backend.is_some()),
                    row.process,
                ))
                .or_insert_with(|| {
                    let mut mark = |module, name: &str| {
                        let key = (module, name.to_owned());
                        *marks
                            .entry(key)
                            .or_insert_with(|| builder.mark(module, name))
                    };
                    let mut stack = Vec::new();
                    if row.is_cut {
                        stack.push(mark(RARE_STACKS, RARE_STACKS));
                    }
                    stack.extend(window.stack(row.stack).map(|f| locations[f]));
                    if let Some(backend) = backend {
                        stitch(window, locations, row, backend, &mut mark, &mut stack);
                    }
                    stack.into()
                });
            let thread = Thread {
                tid: (row.tid != 0).then_some(row.tid),
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

/// Appends to a backend's stack the backend's process, the query, and the caller's stack.
fn stitch(
    window: &Window,
    locations: &[LocationId],
    row: &RowKey,
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

/// The labels of an attribution. A backend's service is that of its caller.
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

/// The samples that found the stack table full, each with a single frame that says so.
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
    let one = process.filter(|process| process.pid != 0);
    let pid = one.map_or_else(String::new, |process| process.pid.to_string());
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

/// The name up to its NUL. Invalid UTF-8 is replaced.
fn thread_name(bytes: &[u8; 16]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(16);
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
