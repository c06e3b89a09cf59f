//! The shop's pages: files that are part of this program, so that it serves them from anywhere.
//!
//! Nothing in them comes from another host, and the policy says so to the browser.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::LazyLock;

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::problem::Problem;

/// What a page of the shop may load: what the gateway itself serves, and no script or style that
/// stands in the page. It is in nobody else's frame.
const POLICY: &str =
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'";

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const SVG: &str = "image/svg+xml";

struct Asset {
    name: &'static str,
    kind: &'static str,
    text: &'static str,
}

macro_rules! asset {
    ($name:literal, $kind:ident) => {
        Asset {
            name: $name,
            kind: $kind,
            text: include_str!(concat!("../../../assets/", $name)),
        }
    };
}

const INDEX: Asset = asset!("index.html", HTML);

const ASSETS: [Asset; 18] = [
    asset!("actions.js", SCRIPT),
    asset!("api.js", SCRIPT),
    asset!("app.js", SCRIPT),
    asset!("chart.js", SCRIPT),
    asset!("demo.js", SCRIPT),
    asset!("dialog.js", SCRIPT),
    asset!("dom.js", SCRIPT),
    asset!("expected.js", SCRIPT),
    asset!("flame.svg", SVG),
    asset!("flames.js", SCRIPT),
    asset!("icons.svg", SVG),
    asset!("logs.js", SCRIPT),
    asset!("map.js", SCRIPT),
    asset!("shop.js", SCRIPT),
    asset!("status.js", SCRIPT),
    asset!("storm.js", SCRIPT),
    asset!("style.css", STYLE),
    asset!("traces.js", SCRIPT),
];

/// One tag for all files, since they change together, with the program.
static TAG: LazyLock<String> = LazyLock::new(|| {
    let mut hasher = DefaultHasher::new();
    for asset in ASSETS.iter().chain([&INDEX]) {
        asset.text.hash(&mut hasher);
    }
    format!("\"{:016x}\"", hasher.finish())
});

/// `/` and `/assets/…`.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route(
            "/",
            get(|headers: HeaderMap| async move { answer(&INDEX, &headers) }),
        )
        .route("/assets/{name}", get(asset))
}

async fn asset(Path(name): Path<String>, headers: HeaderMap) -> Response {
    match ASSETS.iter().find(|asset| asset.name == name) {
        Some(asset) => answer(asset, &headers),
        None => Problem::not_found("no_such_page", "the shop has no such file").into_response(),
    }
}

/// The file, or that the browser has it already. It asks each time: names carry no version.
fn answer(asset: &Asset, request: &HeaderMap) -> Response {
    let known = request.get(header::IF_NONE_MATCH);
    let known = known.is_some_and(|tag| tag.as_bytes() == TAG.as_bytes());
    let mut response = if known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        asset.text.into_response()
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(asset.kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if let Ok(tag) = HeaderValue::from_str(&TAG) {
        headers.insert(header::ETAG, tag);
    }
    headers.extend(protection());
    response
}

/// The headers by which a browser keeps to the policy and to the stated media types.
fn protection() -> [(HeaderName, HeaderValue); 3] {
    [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "same-origin"),
    ]
    .map(|(name, value)| (name, HeaderValue::from_static(value)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// No file of the folder is forgotten here.
    #[test]
    fn every_file_is_served() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/assets");
        let files = std::fs::read_dir(folder).unwrap();
        let files = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let served = ASSETS
            .iter()
            .chain([&INDEX])
            .map(|asset| asset.name.to_owned());
        assert_eq!(files.collect::<BTreeSet<_>>(), served.collect());
    }

    /// A browser that has the files is told so, one that has others gets them.
    #[test]
    fn what_is_known_is_not_sent_again() {
        let mut headers = HeaderMap::new();
        let first = answer(&INDEX, &headers);
        assert_eq!(first.status(), StatusCode::OK);
        headers.insert(header::IF_NONE_MATCH, first.headers()[header::ETAG].clone());
        assert_eq!(answer(&INDEX, &headers).status(), StatusCode::NOT_MODIFIED);
        headers.insert(header::IF_NONE_MATCH, HeaderValue::from_static("\"0\""));
        assert_eq!(answer(&INDEX, &headers).status(), StatusCode::OK);
    }
}
