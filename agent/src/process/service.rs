//! The service that a process is an instance of, as it says itself.

use std::fs;

/// Bytes of an environment that are read.
const MAX_ENVIRONMENT: usize = 1 << 20;

/// `service.name` of a process: from the environment with which it was started (`OTEL_SERVICE_NAME`, else
/// `service.name` in `OTEL_RESOURCE_ATTRIBUTES`). `None` when it says nothing, or has gone.
///
/// <https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>
pub fn name_of(pid: u32) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    named_in(&environment[..environment.len().min(MAX_ENVIRONMENT)])
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
    variable("OTEL_SERVICE_NAME").or_else(|| {
        let attributes = variable("OTEL_RESOURCE_ATTRIBUTES")?;
        let mut pairs = attributes
            .split(',')
            .filter_map(|pair| pair.split_once('='));
        let (_, name) = pairs.find(|(key, _)| key.trim() == "service.name")?;
        Some(name.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The variable of its own goes first.
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
