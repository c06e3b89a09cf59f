//! The process context of OTEP 4719: a memory mapping with a known name that holds the resource.
//!
//! The crate that publishes it for others (`libdd-library-config`) reads configuration files as
//! well, and brings parsers of YAML and MessagePack for that. Published once and never changed, it
//! is one mapping and one message.
//!
//! <https://github.com/open-telemetry/opentelemetry-specification/blob/main/oteps/profiles/4719-process-ctx.md>

use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::ftruncate;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::resource::v1::Resource as ResourceMessage;
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_sdk::Resource;
use prost::Message;

/// What readers look for, as the mapping's name and as its first bytes.
const NAME: &str = "OTEL_CTX";

const VERSION: u32 = 2;

/// How threads publish their spans ([`super::thread`]).
const THREADS: (&str, &str) = ("threadlocal.schema_version", "tlsdesc_v1_dev");

/// The beginning of the mapping.
#[repr(C)]
struct Header {
    signature: [u8; 8],
    version: u32,
    payload_size: u32,
    /// Nanoseconds of the clock that goes on in sleep; 0 until all else is written.
    published_at: AtomicU64,
    payload: *const u8,
}

const _: () = assert!(size_of::<Header>() == 32);
const _: () = assert!(std::mem::offset_of!(Header, published_at) == 16);

/// The payload, a `opentelemetry.proto.common.v1.ProcessContext`.
#[derive(Clone, PartialEq, Message)]
struct ProcessContext {
    #[prost(message, optional, tag = "1")]
    resource: Option<ResourceMessage>,
    #[prost(message, repeated, tag = "2")]
    extra_attributes: Vec<KeyValue>,
}

/// Publishes `resource` for the rest of this process' life. Later calls change nothing.
pub(in crate::telemetry) fn publish(resource: &Resource) -> Result<(), nix::Error> {
    static PUBLISHED: OnceLock<Result<(), nix::Error>> = OnceLock::new();
    *PUBLISHED.get_or_init(|| map(&encode(resource)))
}

fn encode(resource: &Resource) -> Vec<u8> {
    let (key, value) = THREADS;
    let value = AnyValue {
        value: Some(any_value::Value::StringValue(value.to_owned())),
    };
    let context = ProcessContext {
        resource: Some(ResourceMessage {
            attributes: ResourceAttributesWithSchema::from(resource).attributes.0,
            ..ResourceMessage::default()
        }),
        extra_attributes: vec![KeyValue {
            key: key.to_owned(),
            value: Some(value),
            ..KeyValue::default()
        }],
    };
    context.encode_to_vec()
}

/// Maps header and payload, never to be unmapped. A child that is only forked does not inherit it.
fn map(payload: &[u8]) -> Result<(), nix::Error> {
    let size = size_of::<Header>() + payload.len();
    let length = NonZeroUsize::new(size).ok_or(nix::Error::EINVAL)?;
    let payload_size = u32::try_from(payload.len()).map_err(|_| nix::Error::E2BIG)?;
    let file = memfd_create(NAME, MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&file, i64::try_from(size).map_err(|_| nix::Error::E2BIG)?)?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at a place that the kernel chooses touches no memory that is in use.
    let place = unsafe { mmap(None, length, access, MapFlags::MAP_PRIVATE, &file, 0)? };
    // SAFETY: the mapping was made above with this length, and nobody else knows it.
    unsafe { madvise(place, size, MmapAdvise::MADV_DONTFORK)? };
    let header = place.cast::<Header>();
    // SAFETY: the mapping is `size` bytes, page aligned and writable: the header and behind it the
    // payload are inside. It is never unmapped, so the pointer in the header stays good.
    unsafe {
        let behind = header.add(1).cast::<u8>();
        behind.copy_from_nonoverlapping(std::ptr::NonNull::from(payload).cast(), payload.len());
        header.write(Header {
            signature: *b"OTEL_CTX",
            version: VERSION,
            payload_size,
            published_at: AtomicU64::new(0),
            payload: behind.as_ptr(),
        });
        // Readers are other processes: they see all of it, or the 0.
        let time = clock_gettime(ClockId::CLOCK_BOOTTIME)?;
        let nanoseconds = u64::try_from(time.tv_sec()).unwrap_or_default() * 1_000_000_000
            + u64::try_from(time.tv_nsec()).unwrap_or_default();
        header
            .as_ref()
            .published_at
            .store(nanoseconds.max(1), Ordering::Release);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::FileExt;

    /// What is published can be found by the mapping's name and read from outside, byte for byte.
    #[test]
    fn a_reader_finds_the_resource() {
        let resource = Resource::builder_empty()
            .with_service_name("proof-service")
            .build();
        publish(&resource).unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.contains("/memfd:OTEL_CTX"));
        let (start, _) = line.unwrap().split_once('-').unwrap();
        let start = u64::from_str_radix(start, 16).unwrap();

        let memory = fs::File::open("/proc/self/mem").unwrap();
        let mut header = [0; 32];
        memory.read_exact_at(&mut header, start).unwrap();
        assert_eq!(&header[..8], b"OTEL_CTX");
        assert_eq!(header[8..12], 2_u32.to_ne_bytes());
        assert_ne!(header[16..24], [0; 8], "not published");
        let size = u32::from_ne_bytes(header[12..16].try_into().unwrap());
        let place = u64::from_ne_bytes(header[24..].try_into().unwrap());
        let mut payload = vec![0; size as usize];
        memory.read_exact_at(&mut payload, place).unwrap();

        let context = ProcessContext::decode(payload.as_slice()).unwrap();
        let attributes = context.resource.unwrap().attributes;
        assert_eq!(attributes.len(), 1);
        assert_eq!(attributes[0].key, "service.name");
        assert_eq!(
            attributes[0].value.as_ref().unwrap().value,
            Some(any_value::Value::StringValue("proof-service".to_owned()))
        );
        assert_eq!(context.extra_attributes[0].key, THREADS.0);
    }
}
