//! The floor of the benchmark: a bare pair of relays through the same hops as the mesh, with its wire (tunnels of one HTTP/2
//! connection over TLS) and nothing else: no identity, no policy, no steering, no log. What it costs, any encrypted path costs.

use std::fs;
use std::future::poll_fn;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::{Buf, Bytes, BytesMut};
use clap::{Parser, Subcommand};
use h2::{RecvStream, SendStream, client::SendRequest};
use rustls::crypto::aws_lc_rs;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The name in the certificate.
const NAME: &str = "floor";

#[derive(Parser)]
#[command(about = "The bare pair of relays that the mesh is compared with")]
struct Arguments {
    #[command(subcommand)]
    role: Role,
    /// Where `cert.der` and `key.der` are: both relays read the same
    #[arg(long, global = true, default_value = ".")]
    certificate: PathBuf,
    /// Ports of the application: each is listened on, or connected to, on the loopback address
    #[arg(long, global = true, value_delimiter = ',', default_value = "7001")]
    ports: Vec<u16>,
    /// The loopback address that the client's relay listens on
    #[arg(long, global = true, default_value = "127.0.0.1")]
    at: Ipv4Addr,
    #[arg(long, global = true, default_value_t = 1)]
    workers: usize,
    #[command(flatten)]
    tuning: Tuning,
}

/// Every size was chosen by measuring: smaller frames and buffers cost CPU time in calls, larger ones in cache misses. A buffer
/// between socket and TLS, which would spare rustls its reads of 4 KiB, costs more in copies than it saves.
#[derive(Parser, Clone, Copy)]
struct Tuning {
    /// The most that is read from an application at once, in KiB
    #[arg(long, global = true, default_value_t = 256)]
    buffer: usize,
    /// The largest HTTP/2 frame, in KiB
    #[arg(long, global = true, default_value_t = 256)]
    frame: u32,
    /// Ciphertext kept before it is written, in KiB
    #[arg(long, global = true, default_value_t = 256)]
    write_behind: usize,
    /// The window of a tunnel, in KiB; that of the connection is four times as large
    #[arg(long, global = true, default_value_t = 4096)]
    window: u32,
}

#[derive(Subcommand, Clone, Copy)]
enum Role {
    /// Beside the client: loopback to wire
    Out { to: SocketAddr },
    /// Beside the server: wire to loopback
    In { listen: SocketAddr },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runtime = match arguments.workers {
        1 => tokio::runtime::Builder::new_current_thread().enable_all().build()?,
        workers => tokio::runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .enable_all()
            .build()?,
    };
    runtime.block_on(async {
        match arguments.role {
            Role::Out { to } => out(&arguments, to).await,
            Role::In { listen } => inward(&arguments, listen).await,
        }
    })
}

async fn out(arguments: &Arguments, to: SocketAddr) -> Result<()> {
    let tuning = arguments.tuning;
    let tunnels = connect(arguments, to).await?;
    let mut listeners = Vec::new();
    for port in &arguments.ports {
        listeners.push(
            TcpListener::bind((arguments.at, *port))
                .await
                .context("listen for the client")?,
        );
    }
    announce()?;
    let mut accepting = tokio::task::JoinSet::new();
    for listener in listeners {
        let tunnels = tunnels.clone();
        accepting.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.context("accept")?;
                tokio::spawn(tunnel_out(stream, tunnels.clone(), tuning));
            }
        });
    }
    accepting.join_next().await.context("no ports")??
}

async fn connect(arguments: &Arguments, to: SocketAddr) -> Result<SendRequest<Bytes>> {
    let tuning = arguments.tuning;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate(arguments)?)?;
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(to)
        .await
        .with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true)?;
    let mut stream = TlsConnector::from(Arc::new(config))
        .connect(ServerName::try_from(NAME)?, stream)
        .await?;
    stream.get_mut().1.set_buffer_limit(Some(tuning.write_behind << 10));
    let (tunnels, connection) = h2::client::Builder::new()
        .initial_window_size(tuning.window << 10)
        .initial_connection_window_size(tuning.window << 12)
        .max_frame_size(tuning.frame << 10)
        .max_send_buffer_size(1 << 20)
        .enable_push(false)
        .handshake(stream)
        .await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            eprintln!("the connection ended: {error}");
        }
    });
    Ok(tunnels)
}

async fn inward(arguments: &Arguments, listen: SocketAddr) -> Result<()> {
    let tuning = arguments.tuning;
    let key = fs::read(arguments.certificate.join("key.der")).context("read key.der")?;
    let key = PrivateKeyDer::try_from(key).map_err(anyhow::Error::msg)?;
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate(arguments)?], key)?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("listen on {listen}"))?;
    announce()?;
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        stream.set_nodelay(true)?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            if let Err(error) = serve(stream, acceptor, tuning).await {
                eprintln!("the connection ended: {error:#}");
            }
        });
    }
}

async fn serve(stream: TcpStream, acceptor: TlsAcceptor, tuning: Tuning) -> Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    stream.get_mut().1.set_buffer_limit(Some(tuning.write_behind << 10));
    let mut connection = h2::server::Builder::new()
        .initial_window_size(tuning.window << 10)
        .initial_connection_window_size(tuning.window << 12)
        .max_frame_size(tuning.frame << 10)
        .max_send_buffer_size(1 << 20)
        .handshake(stream)
        .await?;
    while let Some(request) = connection.accept().await {
        let (request, respond) = request?;
        tokio::spawn(tunnel_in(request, respond, tuning));
    }
    Ok(())
}

/// A tunnel that fails takes its connection with it; the load tool sees and reports that.
async fn tunnel_out(stream: TcpStream, tunnels: SendRequest<Bytes>, tuning: Tuning) -> Result<()> {
    stream.set_nodelay(true)?;
    let request = http::Request::connect(stream.local_addr()?.to_string()).body(())?;
    let (response, sender) = tunnels.ready().await?.send_request(request, false)?;
    let (read, write) = stream.into_split();
    let receiving = async {
        let receiver = response.await?.into_body();
        receive(receiver, write).await
    };
    tokio::try_join!(send(read, sender, tuning), receiving)?;
    Ok(())
}

async fn tunnel_in(
    request: http::Request<RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    tuning: Tuning,
) -> Result<()> {
    let port = request.uri().port_u16().context("no port in the authority")?;
    let stream = TcpStream::connect((IpAddr::V4(Ipv4Addr::LOCALHOST), port)).await?;
    stream.set_nodelay(true)?;
    let sender = respond.send_response(http::Response::new(()), false)?;
    let (read, write) = stream.into_split();
    tokio::try_join!(send(read, sender, tuning), receive(request.into_body(), write))?;
    Ok(())
}

async fn send(mut read: OwnedReadHalf, mut sender: SendStream<Bytes>, tuning: Tuning) -> Result<()> {
    /// Where buffers begin: connections of one request need no more.
    const FIRST: usize = 8 << 10;
    let most = tuning.buffer << 10;
    let mut size = FIRST;
    let mut buffer = BytesMut::new();
    loop {
        sender.reserve_capacity(1);
        while sender.capacity() == 0 {
            poll_fn(|context| sender.poll_capacity(context))
                .await
                .context("the tunnel is closed")??;
        }
        // Small reads share a buffer; one that is nearly full is replaced, or reused when all that it held is sent.
        if buffer.capacity() < size / 2 {
            buffer.reserve(size);
        }
        let count = read.read_buf(&mut buffer).await?;
        if count == 0 {
            sender.send_data(Bytes::new(), true)?;
            return Ok(());
        }
        if count >= size / 2 {
            size = (size * 4).min(most);
        }
        sender.send_data(buffer.split().freeze(), false)?;
    }
}

async fn receive(mut receiver: RecvStream, mut write: OwnedWriteHalf) -> Result<()> {
    while let Some(data) = receiver.data().await {
        let mut data = data?;
        let count = data.len();
        while data.has_remaining() {
            write.write_buf(&mut data).await?;
        }
        receiver.flow_control().release_capacity(count)?;
    }
    Ok(write.shutdown().await?)
}

fn certificate(arguments: &Arguments) -> Result<CertificateDer<'static>> {
    Ok(fs::read(arguments.certificate.join("cert.der"))
        .context("read cert.der")?
        .into())
}

/// The suite that the mesh puts first.
fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384];
    Arc::new(provider)
}

/// Whoever started it waits for this line.
fn announce() -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "listening")?;
    Ok(stdout.flush()?)
}
