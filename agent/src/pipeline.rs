//! What happens to a recording after its last sample. It is first saved without names, because naming takes
//! long and reads files that other users wrote; then it is named.

use crate::{
    cost,
    naming::{self, Namer, Progress, Spawner},
    profile::ResolvedProfile,
    report::{OutputError, Outputs, Unnamed, caller_notes},
    session::Recording,
    symbolize::Options,
};

/// Observes the stages of the pipeline, and may end naming early.
pub trait Observer {
    /// The recording was saved without names, or could not be saved.
    fn saved(&self, unnamed: Result<&Unnamed, &OutputError>);

    /// The functions of a file are going to be named.
    fn naming(&self, progress: Progress<'_>);

    /// Whether to continue naming. Called at least ten times a second.
    fn go_on(&self) -> bool;
}

/// Saves the recording, names every frame, and completes the measurements with the cost of that. The saved
/// recording is returned too; dropping it removes it, which the caller does when the outputs have been
/// written.
pub fn name_functions(
    recording: Recording,
    outputs: &Outputs,
    spawner: &Spawner,
    observer: &dyn Observer,
) -> (ResolvedProfile, Option<Unnamed>) {
    let Recording {
        window,
        meta,
        runtime,
        ..
    } = recording;
    let before = cost::cpu_seconds();
    let mut profile = naming::resolve_unnamed(&window, meta.clone());
    profile.runtime = runtime.clone();
    profile
        .runtime
        .note("functions have no names, because the recording was saved before naming");
    let unnamed = outputs.write_unnamed(&profile);
    observer.saved(unnamed.as_ref());
    drop(profile);
    let mut go_on = || observer.go_on();
    let mut namer = Namer::new(spawner, Options::default(), &mut go_on);
    let progress = |progress: Progress<'_>| observer.naming(progress);
    let mut profile = naming::resolve_apart(&window, &mut namer, meta, progress);
    drop(namer);
    let notes = std::mem::replace(&mut profile.runtime, runtime).notes;
    for note in notes.into_iter().chain(caller_notes(&profile)) {
        profile.runtime.note(note);
    }
    profile.runtime.agent.cpu_seconds.symbolising = cost::cpu_seconds() - before;
    profile.runtime.agent.max_rss_bytes.peak = cost::max_rss_bytes();
    (profile, unnamed.ok())
}
