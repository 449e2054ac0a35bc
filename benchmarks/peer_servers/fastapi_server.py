"""FastAPI on uvicorn, a process for each core.

Settings: ``uvicorn[standard]``, with uvloop and httptools; one worker process for each core
(https://fastapi.tiangolo.com/deployment/server-workers); blocking calls off the loop, in FastAPI's own pool
of threads; no access log.
"""

import uvicorn
from bare import PORT, WORKERS, Bare
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

app = FastAPI()
model = Bare()


@app.post("/infer")
async def infer(request: Request):
    body = await request.body()
    return Response(await run_in_threadpool(model.run, body), media_type="application/octet-stream")


if __name__ == "__main__":
    uvicorn.run(
        "fastapi_server:app",
        host="127.0.0.1",
        port=PORT,
        workers=WORKERS,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
