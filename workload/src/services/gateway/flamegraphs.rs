//! The pictures: a list of them, and each by its name.

use std::path::Path as FilePath;
use std::time::UNIX_EPOCH;

use axum::extract::{Path, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use super::Gateway;
use crate::problem::Problem;

/// The most pictures in a list: the story makes a dozen.
const MAX_LISTED: usize = 200;

/// A flame graph's own script and style stand in it. It may run those, and load nothing.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'self'";

/// A picture.
#[derive(Debug, Serialize)]
struct Picture {
    file: String,
    bytes: u64,
    modified_unix_ms: u64,
}

pub fn router() -> Router<Gateway> {
    Router::new()
        .route("/flamegraphs", get(list))
        .route("/flamegraphs/{file}", get(picture))
}

async fn list(State(gateway): State<Gateway>) -> Json<Vec<Picture>> {
    let mut pictures = Vec::new();
    let directory = &gateway.0.flamegraphs;
    match tokio::fs::read_dir(directory).await {
        Ok(mut entries) => {
            while let Ok(Some(entry)) = entries.next_entry().await {
                pictures.extend(Picture::of(&entry).await);
            }
        }
        // A directory that is not there yet has no pictures.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(directory = %directory.display(), %error, "no pictures can be had");
        }
    }
    pictures.sort_by(|a, b| a.file.cmp(&b.file));
    pictures.truncate(MAX_LISTED);
    Json(pictures)
}

impl Picture {
    async fn of(entry: &tokio::fs::DirEntry) -> Option<Self> {
        let file = entry.file_name().into_string().ok()?;
        let metadata = entry.metadata().await.ok()?;
        let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        (is_picture(&file) && metadata.is_file()).then(|| Self {
            file,
            bytes: metadata.len(),
            modified_unix_ms: u64::try_from(modified.as_millis()).unwrap_or(u64::MAX),
        })
    }
}

/// Whether a name is that of a picture in this directory, and of nothing elsewhere.
fn is_picture(file: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    file.ends_with(".svg") && !file.starts_with('.') && file.chars().all(is_plain)
}

async fn picture(
    State(gateway): State<Gateway>,
    Path(file): Path<String>,
) -> Result<Response, Problem> {
    let absent = || Problem::not_found("no_such_picture", format!("there is no picture {file}"));
    if !is_picture(&file) {
        return Err(absent());
    }
    let path = FilePath::new(&gateway.0.flamegraphs).join(&file);
    let svg = tokio::fs::read(path).await.map_err(|_| absent())?;
    let headers = [
        (header::CONTENT_TYPE, "image/svg+xml"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // A new recording has the same name.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    let headers = headers.map(|(name, value)| (name, HeaderValue::from_static(value)));
    Ok((headers, svg).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No name leads out of the directory.
    #[test]
    fn only_pictures_are_shown() {
        for file in ["storm.svg", "storm-vs-fixed.svg", "first_flame.2.svg"] {
            assert!(is_picture(file), "{file}");
        }
        for file in [
            "", ".svg", "../x.svg", "a/b.svg", "x.pb.gz", "x.svg/..", "x y.svg",
        ] {
            assert!(!is_picture(file), "{file}");
        }
    }
}
