//! The event that a PostgreSQL backend waits for, or is about to wait for.

use std::borrow::Cow;

/// Types of heavyweight locks by number: `LockTagType` (src/include/storage/lock.h) and `LockTagTypeNames`
/// (src/backend/utils/adt/lockfuncs.c). The numbers are the same in versions 14 to 18; the last type was
/// added in version 16.
const LOCKS: [&str; 12] = [
    "relation",
    "extend",
    "frozenid",
    "page",
    "tuple",
    "transactionid",
    "virtualxid",
    "spectoken",
    "object",
    "userlock",
    "advisory",
    "applytransaction",
];

/// `wait_event_info`: the class is in the upper byte, the event in the lower half; 0 means no event
/// (src/include/utils/wait_event.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WaitEvent(pub u32);

impl WaitEvent {
    /// As in `pg_stat_activity.wait_event_type`.
    pub fn class(self) -> &'static str {
        match self.0 >> 24 {
            0x01 => "LWLock",
            0x03 => "Lock",
            0x04 => "BufferPin",
            0x05 => "Activity",
            0x06 => "Client",
            0x07 => "Extension",
            0x08 => "IPC",
            0x09 => "Timeout",
            0x0a => "IO",
            0x0b => "InjectionPoint",
            _ => "",
        }
    }

    /// As in `pg_stat_activity.wait_event`, if the number is the same in versions 14 to 18; otherwise class
    /// and number (`IO:21`). The other classes are renumbered with each version, and the numbers of
    /// lightweight locks and extensions differ from server to server.
    pub fn name(self) -> Cow<'static, str> {
        let (class, event) = (self.class(), self.0 & 0xffff);
        let known = match (class, event) {
            ("", _) => Some(""),
            ("Client", 0) => Some("ClientRead"),
            ("Client", 1) => Some("ClientWrite"),
            ("BufferPin", 0) => Some("BufferPin"),
            ("Lock", event) => LOCKS.get(event as usize).copied(),
            _ => None,
        };
        match known {
            Some(name) => Cow::Borrowed(name),
            None => Cow::Owned(format!("{class}:{event}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An event is named if its number means the same in every version.
    #[test]
    fn names() {
        let told = |info| (WaitEvent(info).class(), WaitEvent(info).name());
        assert_eq!(told(0), ("", "".into()));
        assert_eq!(told(0x0600_0000), ("Client", "ClientRead".into()));
        assert_eq!(told(0x0300_0005), ("Lock", "transactionid".into()));
        assert_eq!(told(0x0300_00ff), ("Lock", "Lock:255".into()));
        assert_eq!(told(0x0a00_0015), ("IO", "IO:21".into()));
        assert_eq!(told(0xff00_0001), ("", "".into()));
    }
}
