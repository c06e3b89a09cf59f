//! One HTTP server for all services: loopback by default, bounded in time, graceful at the end.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use axum::Router;
use axum_server::Handle;

/// What precedes the address on the line by which a service says that it is ready.
pub const LISTENING: &str = "listening on ";

/// A client that has not sent its request's head after this long is cut off.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// After a signal, requests in flight have this long to end: the statement timeout, the wait
/// for a connection before it, and some time to write the answer.
const DRAIN: Duration = Duration::from_secs(8);

/// A server that could not start or broke down.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken or not ours.
    #[error(
        "cannot listen on {address}: {source}; choose another with --port \
         (`--port 0` takes any free one)"
    )]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The accept loop ended with an error.
    #[error("the HTTP server on {address} failed: {source}")]
    Serve {
        /// The address served.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A bound address on which a service can be run.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Takes `address`; port 0 takes any free port.
    pub fn bind(address: SocketAddr) -> Result<Self, ServeError> {
        let bind = || {
            let listener = TcpListener::bind(address)?;
            let address = listener.local_addr()?;
            Ok(Self { listener, address })
        };
        bind().map_err(|source| ServeError::Bind { address, source })
    }

    /// The address that was taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves `app` until `shutdown` resolves; then takes no new connection, lets the requests
    /// in flight end, and returns.
    pub async fn serve(
        self,
        app: Router,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ServeError> {
        let address = self.address;
        let handle = Handle::new();
        let stopper = handle.clone();
        tokio::spawn(async move {
            shutdown.await;
            tracing::info!(
                connections = stopper.connection_count(),
                "shutting down: waiting for the requests in flight"
            );
            stopper.graceful_shutdown(Some(DRAIN));
        });
        let serve = async {
            let mut server = axum_server::from_tcp(self.listener)?
                .handle(handle)
                .first_request_timeout(HEADER_TIMEOUT);
            server
                .http_builder()
                .http1()
                .header_read_timeout(HEADER_TIMEOUT);
            server.serve(app.into_make_service()).await
        };
        serve
            .await
            .map_err(|source| ServeError::Serve { address, source })
    }
}
