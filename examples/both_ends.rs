//! Both ends of one connection serve: a server calls the client that calls it, on the connection on which it was called.
//!
//! `cargo run --release --example both_ends`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tollway::rpc::{CallContext, CallError, Services};
use tollway::{Server, SessionConfig};

/// What the server does.
#[tollway::service]
trait Installer {
    /// Installs a package, and asks its caller before each step.
    async fn install(&self, cx: &CallContext, package: &str) -> Result<u32, String>;
}

/// What the client does for the server.
#[tollway::service]
trait Consent {
    async fn may(&self, step: &str) -> bool;
}

struct Careful;

/// Kept with the connection: how often this caller was here.
#[derive(Default)]
struct Visits(AtomicU32);

impl Installer for Careful {
    async fn install(&self, cx: &CallContext, package: &str) -> Result<u32, String> {
        let caller = ConsentClient::from(cx.connection());
        for step in ["download", "unpack", "run"] {
            match caller.may(&format!("{step} {package}")).await {
                Ok(true) => {}
                Ok(false) => return Err(format!("may not {step} {package}")),
                Err(error) => return Err(format!("cannot ask: {error}")),
            }
        }
        Ok(cx.data().get_or_insert_with(Visits::default).0.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

struct Wary;

impl Consent for Wary {
    async fn may(&self, step: &str) -> bool {
        let may = !step.starts_with("run virus");
        println!("  asked whether to {step}: {}", if may { "yes" } else { "no" });
        may
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let services = Services::new().with(InstallerServer::new(Careful));
    let serving = SessionConfig { services, ..SessionConfig::default() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, serving).await?;
    let endpoint = server.endpoint().clone();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));

    let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
    let installer = InstallerClient::from(session.open_serving("installer", ConsentServer::new(Wary)).await?);
    assert_eq!(installer.install("editor").await, Ok(1));
    let refused = installer.install("virus").await.expect_err("it may not run");
    assert_eq!(refused, CallError::App("may not run virus".to_owned()));
    assert_eq!(installer.install("game").await, Ok(2));
    println!("the server asked its caller 9 times on the connection of the calls: {refused}");

    // Who serves nothing can be asked nothing.
    let silent: InstallerClient = session.open_client().await?;
    let refused = silent.install("editor").await.expect_err("nobody answers");
    println!("on a connection whose opener serves nothing: {refused}");
    assert!(matches!(refused, CallError::App(text) if text.starts_with("cannot ask")));
    Ok(())
}
