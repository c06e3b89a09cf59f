//! The name of the service that a process belongs to, as the process itself states it.

use std::{fs::File, io::Read as _, os::unix::fs::FileExt as _};

use prost::Message as _;

/// Maximum number of bytes that are read of an environment.
const MAX_ENVIRONMENT: u64 = 1 << 20;
/// Maximum number of bytes that are read of a list of mappings: some 80,000 mappings.
const MAX_MAPS: u64 = 8 << 20;
/// Maximum number of bytes that are kept of a service's name.
const MAX_NAME: usize = 256;
/// Maximum size of a published resource, bytes. A larger one is ignored.
const MAX_RESOURCE: u32 = 1 << 16;
/// Attempts to read a published resource that changes meanwhile.
const ATTEMPTS: u32 = 3;

/// The `service.name` of a process: from the resource that its OpenTelemetry SDK publishes (OTEP 4719),
/// or else from the environment with which it was started. `None` if it states none, or has ended.
pub fn name_of(pid: u32) -> Option<String> {
    published(pid).or_else(|| in_environment(pid).filter(|name| !name.is_empty()))
}

/// The `service.name` in the environment with which a process was started (`OTEL_SERVICE_NAME`,
/// or else `service.name` in `OTEL_RESOURCE_ATTRIBUTES`); empty if there is none. Forked
/// children have the same environment. `None` if the process has ended.
///
/// <https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>
pub fn in_environment(pid: u32) -> Option<String> {
    let environment = read_at_most(&format!("/proc/{pid}/environ"), MAX_ENVIRONMENT)?;
    // The environment of a process that has ended, but has not been waited for, is empty.
    (!environment.is_empty()).then(|| named_in(&environment).unwrap_or_default())
}

/// The `service.name` in the process context, which is a memory mapping with a special name
/// that forked children do not inherit.
///
/// <https://github.com/open-telemetry/opentelemetry-specification/blob/main/oteps/profiles/4719-process-ctx.md>
pub fn published(pid: u32) -> Option<String> {
    let maps = read_at_most(&format!("/proc/{pid}/maps"), MAX_MAPS)?;
    let maps = String::from_utf8_lossy(&maps);
    let is_context = |line: &&str| {
        [
            "[anon:OTEL_CTX]",
            "[anon_shmem:OTEL_CTX]",
            "/memfd:OTEL_CTX",
        ]
        .iter()
        .any(|name| line.contains(name))
    };
    let mut places = maps.lines().filter(is_context).filter_map(|line| {
        let (start, _) = line.split_once('-')?;
        u64::from_str_radix(start, 16).ok()
    });
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    places.find_map(|place| (0..ATTEMPTS).find_map(|_| resource(&memory, place)))
}

fn read_at_most(path: &str, bytes: u64) -> Option<Vec<u8>> {
    let mut read = Vec::new();
    let file = File::open(path).ok()?;
    file.take(bytes).read_to_end(&mut read).ok()?;
    Some(read)
}

/// Truncates a name that a process chose.
fn cut(mut name: String) -> String {
    name.truncate(name.floor_char_boundary(MAX_NAME));
    name
}

/// Reads `service.name` from the context at the address `place`. Its header: signature (8
/// bytes), version (4), size of the payload (4), time of publishing (8), address of the payload
/// (8). `None` if there is no such name, or if the context changed while it was read.
fn resource(memory: &File, place: u64) -> Option<String> {
    const VERSION: u32 = 2;
    let read = || {
        let mut header = [0; 32];
        memory.read_exact_at(&mut header, place).ok()?;
        Some(header)
    };
    let header = read()?;
    let half = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 4)) << 32;
    if &header[..8] != b"OTEL_CTX" || half(8) != VERSION || word(16) == 0 || half(12) > MAX_RESOURCE
    {
        return None;
    }
    let mut payload = vec![0; half(12) as usize];
    memory.read_exact_at(&mut payload, word(24)).ok()?;
    // The payload may be inconsistent if the header changed meanwhile.
    (read()? == header).then(|| service_name(&payload))?
}

/// The `service.name` of an encoded `opentelemetry.proto.resource.v1.Resource`, or of a
/// resource that is the first field of an enclosing message, as some programs write it.
fn service_name(payload: &[u8]) -> Option<String> {
    let find = |resource: proto::Resource| {
        let named = resource
            .attributes
            .into_iter()
            .find(|pair| pair.key == "service.name")?;
        let name = named.value?.string_value?;
        (!name.is_empty()).then(|| cut(name))
    };
    let inner = |payload| proto::Around::decode(payload).ok()?.resource;
    proto::Resource::decode(payload)
        .ok()
        .and_then(find)
        .or_else(|| find(inner(payload)?))
}

/// The part of OpenTelemetry's messages that is decoded.
mod proto {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Around {
        #[prost(message, optional, tag = "1")]
        pub resource: Option<Resource>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Resource {
        #[prost(message, repeated, tag = "1")]
        pub attributes: Vec<KeyValue>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct KeyValue {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(message, optional, tag = "2")]
        pub value: Option<AnyValue>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct AnyValue {
        #[prost(string, optional, tag = "1")]
        pub string_value: Option<String>,
    }
}

fn named_in(environment: &[u8]) -> Option<String> {
    let variable = |name: &str| {
        let mut variables = environment.split(|byte| *byte == 0);
        variables.find_map(|variable| {
            let value = variable.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
            let value = str::from_utf8(value).ok()?.trim();
            (!value.is_empty()).then(|| value.to_owned())
        })
    };
    let name = variable("OTEL_SERVICE_NAME").or_else(|| {
        let attributes = variable("OTEL_RESOURCE_ATTRIBUTES")?;
        let mut pairs = attributes
            .split(',')
            .filter_map(|pair| pair.split_once('='));
        let (_, name) = pairs.find(|(key, _)| key.trim() == "service.name")?;
        Some(name.trim().to_owned())
    });
    name.map(cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A resource is decoded by itself, and inside an enclosing message. Truncated bytes give no name.
    #[test]
    fn resources() {
        let pair = proto::KeyValue {
            key: "service.name".to_owned(),
            value: Some(proto::AnyValue {
                string_value: Some("shop".to_owned()),
            }),
        };
        let resource = proto::Resource {
            attributes: vec![proto::KeyValue::default(), pair],
        };
        let bytes = resource.encode_to_vec();
        assert_eq!(service_name(&bytes).as_deref(), Some("shop"));
        for cut in 0..bytes.len() {
            assert_eq!(service_name(&bytes[..cut]), None, "cut at {cut}");
        }
        let around = proto::Around {
            resource: Some(resource),
        };
        assert_eq!(
            service_name(&around.encode_to_vec()).as_deref(),
            Some("shop")
        );
    }

    /// `OTEL_SERVICE_NAME` takes precedence.
    #[test]
    fn environments() {
        let named = |text: &str| named_in(text.as_bytes());
        assert_eq!(
            named("A=1\0OTEL_RESOURCE_ATTRIBUTES=a=b,service.name=x\0OTEL_SERVICE_NAME=shop\0")
                .as_deref(),
            Some("shop")
        );
        assert_eq!(
            named("OTEL_RESOURCE_ATTRIBUTES=a=b, service.name = x").as_deref(),
            Some("x")
        );
        assert_eq!(named("OTEL_SERVICE_NAME=\0X=y"), None);
        assert_eq!(named_in(b"OTEL_SERVICE_NAME=\xff"), None);
    }
}
