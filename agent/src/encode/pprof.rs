//! pprof's `profile.proto`, gzipped. It is the file of record, from which every other output can be made.
//!
//! The sample types are `samples/count` and `cpu/nanoseconds`, and `executions/count` if there are any. The
//! recording's circumstances and measurements ([`RecordingMeta`], [`Runtime`]) are one comment in JSON,
//! which other readers show or ignore. A function without a symbol has an empty `system_name`.
//!
//! The messages are declared by hand, following
//! <https://github.com/google/pprof/blob/main/proto/profile.proto>.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::sync::Arc;

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use indexmap::IndexSet;
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::profile::{
    Function, FunctionId, Line, Location, LocationId, Mapping, MappingId, RecordingMeta,
    ResolvedProfile, ResolvedSample, Runtime,
};

/// The maximum number of bytes that a file may unpack to. An hour of a busy machine takes less than 100 MB,
/// so a larger file is taken for a gzip bomb.
pub const MAX_UNPACKED: u64 = 256 * 1024 * 1024;

/// The maximum number of samples, locations, functions, mappings and other fields of the profile that a
/// file may contain. An empty message takes two bytes in the file, but a hundred in memory.
pub const MAX_ENTRIES: usize = 4_000_000;

/// The maximum number of labels of all samples and lines of all locations together (and their other
/// fields), for the same reason. The fullest window has 262,144 rows; with fifty labels each, it stays
/// below this bound.
pub const MAX_PARTS: usize = 16_000_000;

/// The messages of `profile.proto`.
pub mod proto {
    #![expect(missing_docs, reason = "the fields are documented in profile.proto")]

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Profile {
        #[prost(message, repeated, tag = "1")]
        pub sample_type: Vec<ValueType>,
        #[prost(message, repeated, tag = "2")]
        pub sample: Vec<Sample>,
        #[prost(message, repeated, tag = "3")]
        pub mapping: Vec<Mapping>,
        #[prost(message, repeated, tag = "4")]
        pub location: Vec<Location>,
        #[prost(message, repeated, tag = "5")]
        pub function: Vec<Function>,
        #[prost(string, repeated, tag = "6")]
        pub string_table: Vec<String>,
        #[prost(int64, tag = "9")]
        pub time_nanos: i64,
        #[prost(int64, tag = "10")]
        pub duration_nanos: i64,
        #[prost(message, optional, tag = "11")]
        pub period_type: Option<ValueType>,
        #[prost(int64, tag = "12")]
        pub period: i64,
        #[prost(int64, repeated, tag = "13")]
        pub comment: Vec<i64>,
        #[prost(int64, tag = "14")]
        pub default_sample_type: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct ValueType {
        #[prost(int64, tag = "1")]
        pub r#type: i64,
        #[prost(int64, tag = "2")]
        pub unit: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Sample {
        #[prost(uint64, repeated, tag = "1")]
        pub location_id: Vec<u64>,
        #[prost(int64, repeated, tag = "2")]
        pub value: Vec<i64>,
        #[prost(message, repeated, tag = "3")]
        pub label: Vec<Label>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Label {
        #[prost(int64, tag = "1")]
        pub key: i64,
        #[prost(int64, tag = "2")]
        pub str: i64,
        #[prost(int64, tag = "3")]
        pub num: i64,
        #[prost(int64, tag = "4")]
        pub num_unit: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Mapping {
        #[prost(uint64, tag = "1")]
        pub id: u64,
        #[prost(uint64, tag = "2")]
        pub memory_start: u64,
        #[prost(uint64, tag = "3")]
        pub memory_limit: u64,
        #[prost(uint64, tag = "4")]
        pub file_offset: u64,
        #[prost(int64, tag = "5")]
        pub filename: i64,
        #[prost(int64, tag = "6")]
        pub build_id: i64,
        #[prost(bool, tag = "7")]
        pub has_functions: bool,
        #[prost(bool, tag = "8")]
        pub has_filenames: bool,
        #[prost(bool, tag = "9")]
        pub has_line_numbers: bool,
        #[prost(bool, tag = "10")]
        pub has_inline_frames: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Location {
        #[prost(uint64, tag = "1")]
        pub id: u64,
        #[prost(uint64, tag = "2")]
        pub mapping_id: u64,
        #[prost(uint64, tag = "3")]
        pub address: u64,
        #[prost(message, repeated, tag = "4")]
        pub line: Vec<Line>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Line {
        #[prost(uint64, tag = "1")]
        pub function_id: u64,
        #[prost(int64, tag = "2")]
        pub line: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Function {
        #[prost(uint64, tag = "1")]
        pub id: u64,
        #[prost(int64, tag = "2")]
        pub name: i64,
        #[prost(int64, tag = "3")]
        pub system_name: i64,
        #[prost(int64, tag = "4")]
        pub filename: i64,
    }
}

/// Why a file cannot be read as a profile.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The gzip stream is broken or cut short.
    #[error("the gzip stream is damaged or cut short ({0})")]
    Gzip(#[source] std::io::Error),
    /// It unpacks to more than [`MAX_UNPACKED`].
    #[error("it unpacks to more than {} MiB, which is too large for a profile", MAX_UNPACKED >> 20)]
    TooLarge,
    /// It contains more than [`MAX_ENTRIES`] or [`MAX_PARTS`].
    #[error(
        "it contains more than {MAX_ENTRIES} entries or {MAX_PARTS} labels, which is too many for a profile"
    )]
    TooMany,
    /// It is not a protocol buffer of this kind.
    #[error("it is not a pprof profile ({0})")]
    Proto(#[from] prost::DecodeError),
    /// An id or a string index does not exist in the file.
    #[error("{what} {id} does not exist in the file")]
    Dangling {
        /// What was referred to.
        what: &'static str,
        /// Its id or index.
        id: i64,
    },
    /// It has no values that count CPU samples.
    #[error("it has neither samples/count nor cpu/nanoseconds values, so it is not a CPU profile")]
    NoCpuValues,
}

/// The JSON comment.
#[derive(Serialize, Deserialize)]
struct Comment {
    flamestorm: Persisted,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Persisted {
    meta: RecordingMeta,
    runtime: Runtime,
    /// Indices of the mappings that belong to the kernel.
    kernel_mappings: Vec<u32>,
}

#[derive(Default)]
struct Strings(IndexSet<Arc<str>>);

impl Strings {
    fn new() -> Strings {
        Strings(IndexSet::from([Arc::from("")]))
    }

    fn id(&mut self, text: &Arc<str>) -> i64 {
        self.0.insert_full(text.clone()).0 as i64
    }

    fn text(&mut self, text: &str) -> i64 {
        self.id(&Arc::from(text))
    }
}

/// The profile as a gzipped `profile.proto`.
pub fn encode(profile: &ResolvedProfile) -> Vec<u8> {
    let bytes = to_proto(profile).encode_to_vec();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    // Writing into memory does not fail.
    let _ = gzip.write_all(&bytes);
    gzip.finish().unwrap_or_default()
}

fn to_proto(profile: &ResolvedProfile) -> proto::Profile {
    let mut strings = Strings::new();
    let samples_type = value_type(&mut strings, "samples", "count");
    let cpu_type = value_type(&mut strings, "cpu", "nanoseconds");
    let executions_type = value_type(&mut strings, "executions", "count");
    let has_executions = profile.samples.iter().any(|sample| sample.executions > 0);
    let comment = strings.text(&comment(profile));
    proto::Profile {
        sample_type: [samples_type, cpu_type]
            .into_iter()
            .chain(has_executions.then_some(executions_type))
            .collect(),
        sample: profile
            .samples
            .iter()
            .map(|sample| sample_to_proto(sample, has_executions, &mut strings))
            .collect(),
        mapping: mappings_to_proto(profile, &mut strings),
        location: locations_to_proto(profile),
        function: functions_to_proto(profile, &mut strings),
        time_nanos: profile.meta.start_unix_ns,
        duration_nanos: signed(profile.meta.duration_ns),
        period_type: Some(cpu_type),
        period: signed(profile.meta.period_ns()),
        comment: vec![comment],
        default_sample_type: cpu_type.r#type,
        string_table: strings.0.iter().map(ToString::to_string).collect(),
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn value_type(strings: &mut Strings, kind: &str, unit: &str) -> proto::ValueType {
    proto::ValueType {
        r#type: strings.text(kind),
        unit: strings.text(unit),
    }
}

fn comment(profile: &ResolvedProfile) -> String {
    let kernel_mappings = profile
        .mappings
        .iter()
        .zip(0..)
        .filter_map(|(mapping, index)| mapping.is_kernel.then_some(index))
        .collect();
    let comment = Comment {
        flamestorm: Persisted {
            meta: profile.meta.clone(),
            runtime: profile.runtime.clone(),
            kernel_mappings,
        },
    };
    serde_json::to_string(&comment).unwrap_or_default()
}

fn sample_to_proto(
    sample: &ResolvedSample,
    has_executions: bool,
    strings: &mut Strings,
) -> proto::Sample {
    proto::Sample {
        location_id: sample.stack.iter().map(|id| u64::from(id.0) + 1).collect(),
        value: [signed(sample.count), signed(sample.cpu_ns)]
            .into_iter()
            .chain(has_executions.then_some(signed(sample.executions)))
            .collect(),
        label: sample
            .labels
            .iter()
            .map(|(key, value)| proto::Label {
                key: strings.id(key),
                str: strings.id(value),
                ..proto::Label::default()
            })
            .collect(),
    }
}

fn mappings_to_proto(profile: &ResolvedProfile, strings: &mut Strings) -> Vec<proto::Mapping> {
    let mut mappings: Vec<proto::Mapping> = profile
        .mappings
        .iter()
        .zip(1..)
        .map(|(mapping, id)| proto::Mapping {
            id,
            filename: strings.id(&mapping.name),
            build_id: strings.id(&mapping.build_id),
            // Every frame has a name, so no reader needs to look up symbols.
            has_functions: true,
            ..proto::Mapping::default()
        })
        .collect();
    for location in &profile.locations {
        let Some(mapping) = mappings.get_mut(location.mapping.0 as usize) else {
            continue;
        };
        mapping.has_inline_frames |= location.lines.len() > 1;
        for line in &location.lines {
            mapping.has_line_numbers |= line.line > 0;
            let function = profile.functions.get(line.function.0 as usize);
            mapping.has_filenames |= function.is_some_and(|f| !f.file.is_empty());
        }
    }
    mappings
}

fn locations_to_proto(profile: &ResolvedProfile) -> Vec<proto::Location> {
    profile
        .locations
        .iter()
        .zip(1..)
        .map(|(location, id)| proto::Location {
            id,
            mapping_id: u64::from(location.mapping.0) + 1,
            address: location.address,
            line: location
                .lines
                .iter()
                .map(|line| proto::Line {
                    function_id: u64::from(line.function.0) + 1,
                    line: i64::from(line.line),
                })
                .collect(),
        })
        .collect()
}

fn functions_to_proto(profile: &ResolvedProfile, strings: &mut Strings) -> Vec<proto::Function> {
    profile
        .functions
        .iter()
        .zip(1..)
        .map(|(function, id)| proto::Function {
            id,
            name: strings.id(&function.name),
            system_name: strings.id(&function.system_name),
            filename: strings.id(&function.file),
        })
        .collect()
}

/// Reads a profile, gzipped or plain, that was written by this crate or by another tool.
///
/// # Errors
/// A damaged, truncated or hostile file is refused, with the reason. Memory is bounded by [`MAX_UNPACKED`],
/// [`MAX_ENTRIES`] and [`MAX_PARTS`].
pub fn decode(bytes: &[u8]) -> Result<ResolvedProfile, DecodeError> {
    let unpacked;
    let bytes = if bytes.starts_with(&[0x1f, 0x8b]) {
        unpacked = unpack(bytes)?;
        unpacked.as_slice()
    } else {
        bytes
    };
    if bytes.len() as u64 > MAX_UNPACKED {
        return Err(DecodeError::TooLarge);
    }
    refuse_too_many(bytes)?;
    from_proto(proto::Profile::decode(bytes)?)
}

fn unpack(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let mut unpacked = Vec::new();
    MultiGzDecoder::new(bytes)
        .take(MAX_UNPACKED + 1)
        .read_to_end(&mut unpacked)
        .map_err(DecodeError::Gzip)?;
    Ok(unpacked)
}

/// Counts the fields of a file before anything is built from them.
fn refuse_too_many(bytes: &[u8]) -> Result<(), DecodeError> {
    const SAMPLE: u32 = 2;
    const LOCATION: u32 = 4;
    let (mut entries, mut parts) = (0, 0);
    each_field(bytes, |tag, content| {
        entries += 1;
        if tag == SAMPLE || tag == LOCATION {
            each_field(content, |_, _| {
                parts += 1;
                Ok(())
            })?;
        }
        if entries > MAX_ENTRIES || parts > MAX_PARTS {
            return Err(DecodeError::TooMany);
        }
        Ok(())
    })
}

/// Calls `seen` with the tag and the content of every field. The content is empty unless the field is a
/// message or a string.
fn each_field<'a>(
    mut bytes: &'a [u8],
    mut seen: impl FnMut(u32, &'a [u8]) -> Result<(), DecodeError>,
) -> Result<(), DecodeError> {
    use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
    while !bytes.is_empty() {
        let (tag, wire_type) = decode_key(&mut bytes)?;
        let mut content = &bytes[..0];
        if wire_type == WireType::LengthDelimited {
            let length = usize::try_from(decode_varint(&mut bytes)?).unwrap_or(usize::MAX);
            // A field that is cut short is reported by the decoder, which runs after this.
            (content, bytes) = bytes.split_at(length.min(bytes.len()));
        } else {
            skip_field(wire_type, tag, &mut bytes, DecodeContext::default())?;
        }
        seen(tag, content)?;
    }
    Ok(())
}

/// The strings and ids of the file that is being read.
struct Reader {
    strings: Vec<Arc<str>>,
    mappings: HashMap<u64, MappingId>,
    functions: HashMap<u64, FunctionId>,
    locations: HashMap<u64, LocationId>,
}

impl Reader {
    fn text(&self, index: i64) -> Result<Arc<str>, DecodeError> {
        // Index 0 is the empty string by definition, even in a file without a table.
        match usize::try_from(index)
            .ok()
            .and_then(|i| self.strings.get(i))
        {
            Some(text) => Ok(text.clone()),
            None if index == 0 => Ok(Arc::from("")),
            None => Err(DecodeError::Dangling {
                what: "string",
                id: index,
            }),
        }
    }
}

fn find<T: Copy>(map: &HashMap<u64, T>, what: &'static str, id: u64) -> Result<T, DecodeError> {
    map.get(&id).copied().ok_or(DecodeError::Dangling {
        what,
        id: id as i64,
    })
}

fn from_proto(file: proto::Profile) -> Result<ResolvedProfile, DecodeError> {
    let mut reader = Reader {
        strings: file.string_table.iter().map(|s| Arc::from(&**s)).collect(),
        mappings: HashMap::new(),
        functions: HashMap::new(),
        locations: HashMap::new(),
    };
    let values = Values::find(&file, &reader)?;
    let persisted = persisted(&file, &reader)?;
    let mut profile = ResolvedProfile {
        mappings: read_mappings(&file, &mut reader, persisted.as_ref())?,
        functions: read_functions(&file, &mut reader)?,
        ..ResolvedProfile::default()
    };
    read_locations(&file, &mut reader, &mut profile)?;
    for sample in &file.sample {
        profile.samples.push(read_sample(sample, &reader, values)?);
    }
    (profile.meta, profile.runtime) = match persisted {
        Some(persisted) => (persisted.meta, persisted.runtime),
        None => (foreign_meta(&file), Runtime::default()),
    };
    Ok(profile)
}

fn foreign_meta(file: &proto::Profile) -> RecordingMeta {
    let period = u64::try_from(file.period).unwrap_or(0);
    RecordingMeta {
        start_unix_ns: file.time_nanos,
        duration_ns: u64::try_from(file.duration_nanos).unwrap_or(0),
        frequency_hz: 1_000_000_000u64
            .checked_div(period)
            .and_then(|hz| u32::try_from(hz).ok())
            .unwrap_or(0),
        ..RecordingMeta::default()
    }
}

/// The positions of the known types among a sample's values.
#[derive(Clone, Copy)]
struct Values {
    count: Option<usize>,
    cpu: Option<usize>,
    executions: Option<usize>,
    period: u64,
}

impl Values {
    fn find(file: &proto::Profile, reader: &Reader) -> Result<Values, DecodeError> {
        let mut values = Values {
            count: None,
            cpu: None,
            executions: None,
            period: u64::try_from(file.period).unwrap_or(0),
        };
        for (index, kind) in file.sample_type.iter().enumerate() {
            match (&*reader.text(kind.r#type)?, &*reader.text(kind.unit)?) {
                ("samples", "count") => values.count = Some(index),
                ("cpu", "nanoseconds") => values.cpu = Some(index),
                ("executions", "count") => values.executions = Some(index),
                _ => {}
            }
        }
        if values.count.is_none() && values.cpu.is_none() {
            return Err(DecodeError::NoCpuValues);
        }
        Ok(values)
    }

    fn read(&self, values: &[i64]) -> (u64, u64, u64) {
        let read = |index: Option<usize>| {
            let value = values.get(index?)?;
            u64::try_from(*value).ok()
        };
        let (count, cpu) = (read(self.count), read(self.cpu));
        let count = count.unwrap_or_else(|| {
            let cpu = cpu.unwrap_or(0);
            cpu.checked_div(self.period).unwrap_or(cpu)
        });
        (
            count,
            cpu.unwrap_or_else(|| count.saturating_mul(self.period)),
            read(self.executions).unwrap_or(0),
        )
    }
}

fn persisted(file: &proto::Profile, reader: &Reader) -> Result<Option<Persisted>, DecodeError> {
    for comment in &file.comment {
        let text = reader.text(*comment)?;
        if let Ok(comment) = serde_json::from_str::<Comment>(&text) {
            return Ok(Some(comment.flamestorm));
        }
    }
    Ok(None)
}

fn read_mappings(
    file: &proto::Profile,
    reader: &mut Reader,
    persisted: Option<&Persisted>,
) -> Result<Vec<Mapping>, DecodeError> {
    let mut mappings = Vec::new();
    for (mapping, index) in file.mapping.iter().zip(0..) {
        let name = reader.text(mapping.filename)?;
        let is_kernel = match persisted {
            Some(persisted) => persisted.kernel_mappings.contains(&index),
            None => name.starts_with("[kernel"),
        };
        reader.mappings.insert(mapping.id, MappingId(index));
        mappings.push(Mapping {
            name,
            build_id: reader.text(mapping.build_id)?,
            is_kernel,
        });
    }
    Ok(mappings)
}

fn read_functions(
    file: &proto::Profile,
    reader: &mut Reader,
) -> Result<Vec<Function>, DecodeError> {
    let mut functions = Vec::new();
    for (function, index) in file.function.iter().zip(0..) {
        reader.functions.insert(function.id, FunctionId(index));
        functions.push(Function {
            name: reader.text(function.name)?,
            system_name: reader.text(function.system_name)?,
            file: reader.text(function.filename)?,
        });
    }
    Ok(functions)
}

fn read_locations(
    file: &proto::Profile,
    reader: &mut Reader,
    profile: &mut ResolvedProfile,
) -> Result<(), DecodeError> {
    for (location, index) in file.location.iter().zip(0..) {
        let mapping = match location.mapping_id {
            0 => no_mapping(profile),
            id => find(&reader.mappings, "mapping", id)?,
        };
        let mut lines = Vec::with_capacity(location.line.len());
        for line in &location.line {
            lines.push(Line {
                function: find(&reader.functions, "function", line.function_id)?,
                line: u32::try_from(line.line).unwrap_or(0),
            });
        }
        if lines.is_empty() {
            lines.push(nameless(profile, mapping, location.address));
        }
        reader.locations.insert(location.id, LocationId(index));
        profile.locations.push(Location {
            mapping,
            address: location.address,
            lines,
        });
    }
    Ok(())
}

/// The mapping of locations that have none, which occur in other tools' files.
fn no_mapping(profile: &mut ResolvedProfile) -> MappingId {
    const NAME: &str = "[no mapping]";
    let known = profile.mappings.iter().position(|m| &*m.name == NAME);
    let index = known.unwrap_or_else(|| {
        profile.mappings.push(Mapping {
            name: Arc::from(NAME),
            ..Mapping::default()
        });
        profile.mappings.len() - 1
    });
    MappingId(index as u32)
}

/// A name for a location that has none, which occurs in other tools' files.
fn nameless(profile: &mut ResolvedProfile, mapping: MappingId, address: u64) -> Line {
    let module = &profile.mappings[mapping.0 as usize];
    let name = format!("{}+{address:#x}", module.short_name());
    profile.functions.push(Function {
        name: Arc::from(name),
        ..Function::default()
    });
    Line {
        function: FunctionId(profile.functions.len() as u32 - 1),
        line: 0,
    }
}

fn read_sample(
    sample: &proto::Sample,
    reader: &Reader,
    values: Values,
) -> Result<ResolvedSample, DecodeError> {
    let stack: Result<_, _> = sample
        .location_id
        .iter()
        .map(|id| find(&reader.locations, "location", *id))
        .collect();
    let mut labels = Vec::with_capacity(sample.label.len());
    for label in &sample.label {
        let value = match label.str {
            0 => Arc::from(label.num.to_string()),
            index => reader.text(index)?,
        };
        labels.push((reader.text(label.key)?, value));
    }
    let (count, cpu_ns, executions) = values.read(&sample.value);
    Ok(ResolvedSample {
        labels: labels.into(),
        stack: stack?,
        count,
        cpu_ns,
        executions,
    })
}
