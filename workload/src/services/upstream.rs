//! A service behind the gateway, and a request to it.

use std::time::Duration;

use axum::body::{Bytes, HttpBody};
use axum::http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{self, Client};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::de::DeserializeOwned;

use super::common::REQUEST_TIMEOUT;
use crate::problem::Problem;
use crate::telemetry;

/// Longer than a service takes to give up by itself: its own words are better than ours.
pub const TIMEOUT: Duration = REQUEST_TIMEOUT.saturating_add(Duration::from_secs(1));

/// On a machine that is busy to its limit accepting takes a while; farther than this is away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The largest answer: a hundred products are a twentieth of it, a long list of traces a half.
const MAX_ANSWER: usize = 4 * 1024 * 1024;

/// A client's connections; one for all services.
pub type HttpClient = Client<HttpConnector, Full<Bytes>>;

/// A new client.
pub fn client() -> HttpClient {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .build(connector)
}

/// An address that is none.
#[derive(Debug, thiserror::Error)]
#[error("{url:?} is not the address of the {name}; it looks like http://127.0.0.1:8014")]
pub struct UpstreamError {
    /// Whose it should be.
    name: &'static str,
    /// What was given.
    url: String,
}

/// A service behind the gateway.
#[derive(Debug, Clone)]
pub struct Upstream {
    name: &'static str,
    url: String,
    client: HttpClient,
}

/// What a service answered.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The media type, where it said one.
    pub kind: Option<HeaderValue>,
    /// The body.
    pub body: Bytes,
}

impl Upstream {
    /// The service `name` at `url` (`http://host:port`).
    pub fn new(name: &'static str, url: &str, client: HttpClient) -> Result<Self, UpstreamError> {
        let parsed: Option<Uri> = url.parse().ok();
        let is_plain = parsed.is_some_and(|uri| {
            uri.scheme_str() == Some("http")
                && uri.authority().is_some()
                && matches!(uri.path(), "" | "/")
                && uri.query().is_none()
        });
        if !is_plain {
            let url = url.to_owned();
            return Err(UpstreamError { name, url });
        }
        let url = url.trim_end_matches('/').to_owned();
        Ok(Self { name, url, client })
    }

    /// The service's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Asks for `path` (with its query). `template` is the path without what differs from request
    /// to request, for the span. A service that does not answer within `timeout` is a problem that
    /// names it; its own problems are answers.
    pub async fn call(
        &self,
        template: &'static str,
        method: Method,
        path: &str,
        body: Option<(HeaderValue, Bytes)>,
        timeout: Duration,
    ) -> Result<Answer, Problem> {
        let request = self.request(method, path, body)?;
        let exchange = async {
            let send = async |request| self.client.request(request).await;
            let response = telemetry::http::call(template, request, send)
                .await
                .map_err(|error| self.unreachable(&reason(&error)))?;
            self.read(response).await
        };
        tokio::time::timeout(timeout, exchange)
            .await
            .unwrap_or_else(|_| Err(self.silent(timeout)))
    }

    /// Asks for JSON. Anything but a success is a problem: the service's own, where it said one.
    pub async fn get<T: DeserializeOwned>(
        &self,
        template: &'static str,
        path: &str,
        timeout: Duration,
    ) -> Result<T, Problem> {
        let answer = self
            .call(template, Method::GET, path, None, timeout)
            .await?;
        self.json(&answer)
    }

    /// As [`Self::get`], outside every trace: for what is asked several times a second.
    pub async fn peek<T: DeserializeOwned>(
        &self,
        path: &str,
        timeout: Duration,
    ) -> Result<T, Problem> {
        let request = self.request(Method::GET, path, None)?;
        let exchange = async {
            let response = self.client.request(request).await;
            let response = response.map_err(|error| self.unreachable(&reason(&error)))?;
            self.read(response).await
        };
        let answer = tokio::time::timeout(timeout, exchange).await;
        self.json(&answer.unwrap_or_else(|_| Err(self.silent(timeout)))?)
    }

    async fn read<B>(&self, response: Response<B>) -> Result<Answer, Problem>
    where
        B: HttpBody<Data = Bytes>,
        B::Error: std::error::Error + Send + Sync + 'static,
    {
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await;
        let body = body.map_err(|error| self.unreachable(&error.to_string()))?;
        Ok(Answer {
            status: head.status,
            kind: head.headers.get(header::CONTENT_TYPE).cloned(),
            body: body.to_bytes(),
        })
    }

    fn json<T: DeserializeOwned>(&self, answer: &Answer) -> Result<T, Problem> {
        if answer.status.is_client_error() {
            // It is well, and has no such thing: a trace that it had no part in.
            return Err(self.problem(&format!("it answered {}", answer.status)));
        }
        if !answer.status.is_success() {
            return Err(self.unreachable(&format!("it answered {}", answer.status)));
        }
        serde_json::from_slice(&answer.body)
            .map_err(|error| self.unreachable(&format!("it answered something else: {error}")))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<(HeaderValue, Bytes)>,
    ) -> Result<Request<Full<Bytes>>, Problem> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url));
        let body = match body {
            Some((kind, body)) => {
                request = request.header(header::CONTENT_TYPE, kind);
                body
            }
            None => Bytes::new(),
        };
        request
            .body(Full::new(body))
            .map_err(|error| Problem::bad_request("bad_path", error.to_string()))
    }

    /// Nothing answers there, or not in a way that can be understood.
    fn unreachable(&self, reason: &str) -> Problem {
        tracing::warn!(service = self.name, url = self.url, reason, "unreachable");
        self.problem(reason)
    }

    fn problem(&self, reason: &str) -> Problem {
        let detail = format!("the {} does not answer: {reason}", self.name);
        Problem::new(StatusCode::BAD_GATEWAY, "service_unreachable", detail)
    }

    /// Something is there, and says nothing.
    fn silent(&self, timeout: Duration) -> Problem {
        tracing::warn!(service = self.name, url = self.url, ?timeout, "silent");
        let detail = format!(
            "the {} does not answer: nothing came within {} s",
            self.name,
            timeout.as_secs_f64()
        );
        Problem::new(StatusCode::GATEWAY_TIMEOUT, "service_unreachable", detail)
    }
}

/// The innermost cause, which is the system's own: "Connection refused".
fn reason(error: &legacy::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.body).into_response();
        match self.kind {
            Some(kind) => response.headers_mut().insert(header::CONTENT_TYPE, kind),
            None => response.headers_mut().remove(header::CONTENT_TYPE),
        };
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An address is a scheme, a host and a port.
    #[test]
    fn an_address_is_checked() {
        let check = |url| Upstream::new("product-service", url, client()).map(|u| u.url);
        assert_eq!(check("http://shop:8014").unwrap(), "http://shop:8014");
        assert_eq!(check("http://shop:8014/").unwrap(), "http://shop:8014");
        for url in [
            "",
            "shop:8014",
            "https://shop",
            "http://shop/x",
            "http://shop/?q",
        ] {
            let error = check(url).unwrap_err().to_string();
            assert!(error.contains("product-service"), "{error}");
        }
    }
}
